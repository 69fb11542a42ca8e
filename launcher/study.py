"""`sftcore study`: a grid of runs, one after another here or as one array job; then a table of all.

In: STUDY.yaml. Out: runs/NAME/{study.yaml, recipes/, logs/, shared/, RUN..., study.json}.
Invariant: a run that fails, whatever the way, costs only itself; a second call does what is missing.
Trade-off: each run is a process of its own (about 10 s of imports on two cores), so that one that is killed
for memory takes nothing with it.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sftcore.amounts import counted, duration
from sftcore.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    Problem,
    SftError,
    StoppedOnRequest,
    TrainingFailed,
    UserInputError,
)
from sftcore.fsio import atomic_file, is_locked, read_object, tail_of, write_json
from sftcore.hub import require_hub
from sftcore.launcher.notice import longest_notice, with_notice
from sftcore.launcher.slurm import Resources, describe_jobs, stage_job, submit_chain
from sftcore.recipe import dump_recipe
from sftcore.runs.claim import FINISHED
from sftcore.runs.settle import settle_runs
from sftcore.stages.whole_run import is_finished
from sftcore.study.grid import StudyRun, StudySettings, expand, read_study
from sftcore.study.loss_study import format_loss, losses_of
from sftcore.study.matching_study import NOT_RUN, NOT_RUN_STATE
from sftcore.study.study_report import write_study_report
from sftcore.train.stopping import WITH_INTERRUPT, handling

if TYPE_CHECKING:
    from sftcore.launcher.ways_in import Machines

log = logging.getLogger("sftcore.study")
FAILED = "failed.json"
FINISHED_STATE, FAILED_STATE = "finished", "failed"
ENDED_STATES = (FINISHED_STATE, NOT_RUN_STATE)
RUNNING, STARTED, WAITING = "running", "started", "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study that was read and expanded.

    Args:
        folder: absolute.
        runs: in the order in which they are run.
        rank_options: of `sftcore run`: the ranks that train each run.
    """

    settings: StudySettings
    folder: Path
    runs: Sequence[StudyRun]
    rank_options: Sequence[str] = ()

    def recipe_file(self, run: StudyRun) -> Path:
        """The run's resolved recipe."""
        return self.folder / "recipes" / f"{run.name}.yaml"

    def log_file(self, run: StudyRun) -> Path:
        """What the run said."""
        return self.folder / "logs" / f"{run.name}.log"


def load_study(
    path: Path,
    folder: str | None = None,
    *,
    machines: Machines | None = None,
    rank_options: Sequence[str] = (),
) -> Study:
    """Read and expand a STUDY.yaml; `folder` defaults to runs/NAME.

    Raises:
        UserInputError: with every mistake in it or in any run's recipe.
        MissingEnvironmentError: it runs here, and a model is neither here nor to be had.
    """
    settings = read_study(path)
    where = Path(folder or f"runs/{settings.name}").resolve()
    on = machines.on if machines else "here"
    runs = settle_runs(expand(settings, where), on=on, has_gpu=machines is not None and machines.has_gpus)
    if on != "slurm":
        require_hub(run.recipe for run in runs)
    return Study(settings=settings, folder=where, runs=runs, rank_options=rank_options)


def write_recipes(study: Study) -> None:
    """Save the study and its resolved recipes, so that each run can be started alone."""
    write_json(study.folder / "study.settings.json", study.settings.model_dump(mode="json"))
    for run in study.runs:
        with atomic_file(study.recipe_file(run)) as handle:
            handle.write(dump_recipe(run.recipe))


def run_here(study: Study) -> None:
    """Run what is not finished, one after another, in processes of their own.

    Raises:
        StoppedOnRequest: this process, or a run, was asked to stop; the run is after a checkpoint.
        TrainingFailed: some runs failed; all others are done.
    """
    write_recipes(study)
    pending = [run for run in study.runs if not is_finished(run.recipe)]
    estimates = _estimates(study, pending)
    how_long = f", roughly {duration(sum(estimates))} on this machine" if estimates else ""
    log.info(
        "%s: %s, %d to do%s", study.settings.name, counted(len(study.runs), "run"), len(pending), how_long
    )
    times: list[tuple[float, float]] = []
    weights = estimates or [1.0] * len(pending)
    for number, run in enumerate(pending, start=1):
        time_left = _time_left(times, sum(weights[number - 1 :]))
        log.info("[%d/%d] %s%s", number, len(pending), run.name, time_left)
        started = time.perf_counter()
        code = run_one(study, run)
        if code == EXIT_STOPPED:
            raise StoppedOnRequest(f"stopped on request in {run.name}; start the study again to go on")
        if code:
            log.warning("%s failed with exit code %d: %s", run.name, code, study.log_file(run))
        else:
            times.append((time.perf_counter() - started, weights[number - 1]))
    conclude(study)


def _estimates(study: Study, pending: Sequence[StudyRun]) -> list[float]:
    """Seconds that each will take; none if that can't be known."""
    if not pending:
        return []
    from sftcore.planning.estimate import estimate_seconds

    try:
        return estimate_seconds([run.recipe for run in pending], study.folder / "shared") or []
    except (SftError, OSError, RuntimeError, ValueError) as error:  # the run will tell
        log.debug("no estimate: %s", error)
        return []


def _time_left(times: Sequence[tuple[float, float]], to_do: float) -> str:
    """By the later of the runs so far: the first one also measured memory levels and the base model.

    Args:
        times: seconds and estimate (in any unit) of each finished run.
        to_do: the others' estimates, added up.

    >>> _time_left([(600, 9)], 8), _time_left([(600, 9), (60, 1), (90, 1)], 5)
    ('', ' (about 6 min 15 s left)')
    """
    if len(times) < 2:
        return ""
    spent, estimated = (sum(column) for column in zip(*times[1:], strict=True))
    return f" (about {duration(to_do * spent / estimated)} left)"


def run_number(study: Study, number: int) -> int:
    """Make one run, as a job of an array does; returns its exit code. A job after them concludes the study.

    Raises:
        UserInputError: there is no such run.
    """
    if number >= len(study.runs):
        allowed = f"0 to {len(study.runs) - 1}"
        raise UserInputError(Problem(what="no such run", where="--number", got=str(number), allowed=allowed))
    run = study.runs[number]
    if is_finished(run.recipe):
        log.info("%s is finished", run.name)
        return EXIT_DONE
    write_recipes(study)
    code = run_one(study, run)
    write_json(study.folder / "study.json", summarise(study))
    log.info("%s ended with exit code %d: %s", run.name, code, study.log_file(run))
    return code if code >= 0 else EXIT_FAILED


def submit_study(study: Study, path: Path, resources: Resources, *, throttle: int) -> str:
    """Submit what is not finished as one array of jobs, and one after them that concludes the study.

    Args:
        throttle: how many runs at a time.

    Raises:
        UserInputError: the time limit is no longer than the notice that some run's stop needs.
    """
    write_recipes(study)
    pending = {str(i): run.recipe for i, run in enumerate(study.runs) if not is_finished(run.recipe)}
    if not pending:
        conclude(study)
        return "all runs are finished"
    folder, arguments = (
        study.folder,
        ["study", str(path.resolve()), "--run", str(study.folder), *study.rank_options],
    )
    runs = stage_job(folder, "study", resources, arguments, array=f"{','.join(pending)}%{throttle}")
    needed = longest_notice(pending.values(), has_gpus=resources.gpus_per_node > 0)
    runs = replace(runs, options=with_notice({**runs.options, **resources.run_options()}, needed))
    last = stage_job(folder, "study-report", resources, [*arguments, "--conclude"])
    jobs = [runs, replace(last, after="afterany")]  # whatever becomes of the runs
    return describe_jobs(folder, jobs, submit_chain(folder, jobs))


def run_one(study: Study, run: StudyRun) -> int:
    """Run one in its own process; returns its exit code, which failed.json keeps if it isn't 0 or 75."""
    log_file = study.log_file(run)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sftcore.launcher.cli", "run", str(study.recipe_file(run))]
    command += ["--shared", str(study.folder / "shared"), *study.rank_options]
    with open(log_file, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        with _forwarding(process) as forwarded:
            code = process.wait()
    if code and forwarded:
        code = EXIT_STOPPED  # in a stage that can be killed at any time, it died of the signal
    note = run.recipe.run_folder / FAILED
    if code in (0, EXIT_STOPPED):
        note.unlink(missing_ok=True)
    else:
        write_json(note, {"exit_code": code, "said": tail_of(log_file)})
    if code == 0:
        _drop_weights(study, run)
    return code


def conclude(study: Study) -> None:
    """Write study.json and the study's page; say which runs failed.

    Raises:
        TrainingFailed: some did.
    """
    write_json(study.folder / "study.json", summarise(study))
    try:
        page = write_study_report(study.folder)
        log.info("%s\n%s", page.table, page.html_path)
    except UserInputError as error:
        log.warning("no study page: %s", error)
    failed = [run.name for run in study.runs if state_of(run) == FAILED_STATE]
    if failed:
        raise TrainingFailed(
            f"{len(failed)} of {counted(len(study.runs), 'run')} failed: {', '.join(failed)}; "
            f"see {study.folder / 'logs'}, then start the study again"
        )


def summarise(study: Study) -> dict[str, Any]:
    """Content of study.json: a row a run, with the keys of its report.json that a comparison needs."""
    return {
        "name": study.settings.name,
        "set": study.settings.set,
        "grid": study.settings.grid,
        "draws": study.settings.draws,
        "runs": [_row(run) for run in study.runs],
    }


def _row(run: StudyRun) -> dict[str, Any]:
    path = run.recipe.run_folder / "report.json"
    report = read_object(path) if path.is_file() else {}
    kept = {key: report.get(key) for key in ("n", "acc_base", "acc_tuned", "by_level", "ood")}
    kept |= losses_of(run.recipe.run_folder)
    state = state_of(run)
    kept = read_object(run.recipe.run_folder / NOT_RUN, "reason") if state == NOT_RUN_STATE else kept
    return {"name": run.name, "cell": run.cell, "state": state} | (kept if state in ENDED_STATES else {})


def state_of(run: StudyRun) -> str:
    """finished | not run (too few reasons) | failed | running | started (and interrupted) | waiting."""
    folder = run.recipe.run_folder
    if is_finished(run.recipe):
        return FINISHED_STATE
    if (folder / NOT_RUN).is_file():
        return NOT_RUN_STATE
    if not folder.is_dir():
        return WAITING
    if is_locked(folder):
        return RUNNING
    return FAILED_STATE if (folder / FAILED).is_file() else STARTED


def status_table(study: Study) -> str:
    """A line a run: state, accuracy before and after, losses, time; then a count of states."""
    width = max(len(run.name) for run in study.runs)
    rows = [(run, _row(run)) for run in study.runs]
    lines = [f"{'run':<{width}}  {'state':<9}{'base':>8}{'tuned':>8}{'loss':>9}{'valid':>9}{'time':>14}"]
    lines += [f"{run.name:<{width}}  {_status(run, row)}".rstrip() for run, row in rows]
    counts = Counter(row["state"] for _, row in rows)
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def _status(run: StudyRun, row: dict[str, Any]) -> str:
    folder, state = run.recipe.run_folder, row["state"]
    if state == FAILED_STATE:
        note = read_object(folder / FAILED, "said", "exit_code")
        said = note["said"].splitlines()
        return f"{state:<9}exit code {note['exit_code']}: {said[-1][:60] if said else ''}"
    if state == NOT_RUN_STATE:
        return f"{state:<9}{row['reason']}"
    if state != FINISHED_STATE:
        return state
    shares = [f"{row[key]:.1%}" if row[key] is not None else "-" for key in ("acc_base", "acc_tuned")]
    losses = [format_loss(row[key]) for key in ("last_loss", "lowest_valid_loss")]
    spent = duration(read_object(folder / FINISHED, "seconds")["seconds"])
    numbers = f"{shares[0]:>8}{shares[1]:>8}{losses[0]:>9}{losses[1]:>9}"
    return f"{state:<9}{numbers}{spent:>14}"


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand stop signals on to the run, which ends after a checkpoint; yields those that were handed on."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        process.send_signal(signal.SIGTERM)

    with handling(WITH_INTERRUPT, forward):
        yield forwarded


def _drop_weights(study: Study, run: StudyRun) -> None:
    """A finished run needs no checkpoints; its weights stay if the study says so."""
    shutil.rmtree(run.recipe.run_folder / "checkpoints", ignore_errors=True)
    if not study.settings.keep_models:
        shutil.rmtree(run.recipe.result_folder, ignore_errors=True)
