"""Attempts of a Slurm job: how often it began where it still is; and what its ranks agreed on.

In: `python -m sftcore.launcher.attempts begin|end RECIPE ...` with worker.py's arguments, SLURM_JOB_ID,
SFTCORE_WORLD (number of ranks) and SFTCORE_CODE (srun's exit code); in jobs of stage.sbatch,
SFTCORE_STAGE_JOB. Out: RUN/attempts.jsonl; the agreed exit code.
Invariant: a job is queued again without end only while every attempt leaves more on disk than the one before:
a newer checkpoint, or a stage's finished parts.
Trade-off: an attempt that was killed on its way to the first checkpoint counts as one without progress, so
the limit is 3 (SFTCORE_RETRIES), not 1. No torch is imported: about 0.5 s a call.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftcore.errors import EXIT_DONE, Problem, SftError, TrainingFailed, UserInputError
from sftcore.fsio import append_jsonl, read_jsonl
from sftcore.launcher.ranks import agreed_code, forget_codes, read_codes, worker_parser
from sftcore.recipe import load_recipe
from sftcore.runs.claim import with_run
from sftcore.stages.stage import STAGES

log = logging.getLogger("sftcore.attempts")
ATTEMPTS = "attempts.jsonl"
RETRIES = 3
PROBED = "levels.partial.jsonl"  # a line a batch
PARTS = ".cache/stores/*/part-*/part.json"  # below the current folder


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    options = worker_parser().parse_args(arguments[1:])
    try:
        run = with_run(load_recipe(options.recipe, options.overrides), options.run).run_folder
        if arguments[0] == "begin":
            begin_attempt(run, os.environ)
        else:
            srun, world = int(os.environ["SFTCORE_CODE"]), int(os.environ["SFTCORE_WORLD"])
            print(agreed_code(read_codes(run), world, launcher_code=srun))
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def begin_attempt(run: Path, environment: Mapping[str, str]) -> None:
    """Note that this job starts its ranks now, and at which step.

    Raises:
        TrainingFailed: the job's last attempts, one more than it may be retried, all began at this step.
    """
    step = newest_step(run)
    _note(run, environment["SLURM_JOB_ID"], {"step": step}, environment, what=f"past step {step}")
    forget_codes(run)


def begin_stage(
    run: Path, stage: str, *, shared: Path | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """In a job of stage.sbatch, note that a stage begins, and what is there of it; elsewhere do nothing.

    Args:
        run: the run's folder, or the study's.
        shared: a second folder in which the stage's work may be kept.

    Raises:
        TrainingFailed: as `begin_attempt`.
    """
    job = environment.get("SFTCORE_STAGE_JOB")
    if job:
        done = {"stage": stage, **work_done(*([run, shared] if shared else [run]))}
        _note(run, job, done, environment, what=f"in {stage}")


def _note(run: Path, job: str, done: dict[str, Any], environment: Mapping[str, str], *, what: str) -> None:
    """Add an attempt to attempts.jsonl, unless too many before it began with the same `done`."""
    retries = int(environment.get("SFTCORE_RETRIES") or RETRIES)
    idle = num_idle([row for row in _attempts(run) if row.get("job") == job], done)
    if idle > retries:
        remedy = "read the job's log and RUN/logs; a new job tries again"
        raise TrainingFailed(Problem(what=f"{idle} attempts in a row made no progress {what}", remedy=remedy))
    run.mkdir(parents=True, exist_ok=True)
    append_jsonl(run / ATTEMPTS, {"job": job, **done, "host": os.uname().nodename})


def _attempts(run: Path) -> list[dict[str, Any]]:
    """The rows of attempts.jsonl; a damaged file is put aside, since it only counts."""
    path = run / ATTEMPTS
    try:
        return read_jsonl(path, appended=True) if path.exists() else []
    except UserInputError as error:
        log.warning("counting attempts from 0 again: %s", error)
        path.replace(path.with_name(f"damaged.{ATTEMPTS}"))
        return []


def num_idle(attempts: Sequence[Mapping[str, Any]], done: Mapping[str, Any]) -> int:
    """How many of the last attempts began where the run still is.

    >>> num_idle([{"step": 0}, {"step": 50}, {"step": 50}], {"step": 50})
    2
    """
    count = 0
    while count < len(attempts) and attempts[-1 - count].items() >= done.items():
        count += 1
    return count


def work_done(*folders: Path) -> dict[str, int]:
    """What outlives a stop in run folders and below .cache, by kind: any change of it is progress."""
    partial = [file for folder in folders for file in folder.glob(f"**/{PROBED}")]
    patterns = [pattern for stage in STAGES.values() for pattern in stage.finished]
    finished = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    return {
        "step": max(newest_step(folder) for folder in folders),
        "probed_bytes": sum(file.stat().st_size for file in partial),
        "finished": len(finished),
        "parts": len(list(Path().glob(PARTS))),
    }


def newest_step(run: Path) -> int:
    """Steps done at the newest committed checkpoint; 0 without one."""
    names = (
        file.parent.name.removeprefix("step-") for file in (run / "checkpoints").glob("step-*/COMMITTED")
    )
    return max((int(name) for name in names if name.isdecimal()), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
