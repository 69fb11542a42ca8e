"""`sftcore run`: all stages of a recipe, one after another; runs of a study share what they have in common.

In: a recipe; perhaps a folder that runs share, and the ranks of this machine that train. Out: a finished run
folder with its report, and RUN/finished.json.
Invariant: finished.json is written last; it holds the recipe and a fingerprint of the bytes of model and
data, so a run is skipped only if it would be the same run. Keys that recipes did not have then count as their
defaults, so that a newer version does not undo a study.
Trade-off: what runs share (memory levels, the base model's answers) is copied into each run folder, some
kilobytes to megabytes, so that each folder still explains itself.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sftcore.config import Recipe
from sftcore.data.digests import KnownDigests
from sftcore.data.ledger import Ledger
from sftcore.data.rationales import MIN_REASONED_PAIRS
from sftcore.data.splits import load_records
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate import score
from sftcore.fsio import atomic_file, atomic_folder, fingerprint_of, folder_lock, read_object, write_json
from sftcore.knowledge import levels
from sftcore.knowledge.containment import AliasTable
from sftcore.knowledge.level_files import LEVEL_FILES
from sftcore.model.identity import model_files
from sftcore.model.weight_files import check_weight_files
from sftcore.recipe import changed, source_files
from sftcore.runs.claim import FINISHED, differences, open_run, owner_of
from sftcore.stages.stage import NUMBERLESS, STAGES, is_within, rescored_keys, wanted
from sftcore.study.matching_study import NOT_RUN, NOT_RUN_STATE
from sftcore.tasks import TASKS

log = logging.getLogger("sftcore.whole_run")
DIGESTS = Path(".cache/digests.json")


def run_whole(
    recipe: Recipe, *, shared: Path | None = None, train: Callable[[Recipe], object] | None = None
) -> str:
    """Probe (if facts are selected by level), train, evaluate (if there is held-out data), report.

    Args:
        shared: folder for what several runs of a study have in common; one of them makes it, the others copy
            it. An arm with too few reasons is then not run; alone it is, with a warning.
        train: instead of this process, which does all other stages.

    Returns:
        The report's table, or why the run was left out.

    Raises:
        UserInputError: the folder holds a finished run of other data or another base model; or nothing of the
            held-out data could be scored.
        SftError: of the stage that failed; what was done before it is kept and found again.
    """
    from sftcore.stages.held_out import check_scorable
    from sftcore.study.report import write_report

    run, started = recipe.run_folder, time.perf_counter()
    check_weight_files(recipe.result_folder)
    if not is_finished(recipe):
        _check_not_stale(recipe)
        if why := too_few_reasons(recipe):
            log.warning("%s: %s", recipe.name, why)
        if why and shared is not None:
            return _leave_out(recipe, why)
        check_scorable(recipe)
        (run / NOT_RUN).unlink(missing_ok=True)
        own_ways = {
            "probe": lambda: _probe_once(recipe, shared),
            "train": lambda: (train or STAGES["train"].run)(recipe),
            "evaluate": lambda: _evaluate_once(recipe, shared),
        }
        for stage in wanted(recipe):
            if stage.takes == "recipe" and not stage.within:
                own_ways.get(stage.name, partial(stage.run, recipe))()
    result = write_report(run)
    if not is_finished(recipe):
        seconds = round(time.perf_counter() - started, 1)
        identity = {"recipe": recipe.model_dump(mode="json"), **_files_identity(recipe)}
        write_json(run / FINISHED, {**identity, "seconds": seconds})
    return result.table


def too_few_reasons(recipe: Recipe) -> str:
    """Why an arm with reasons is too small to be compared; empty if it isn't."""
    if not TASKS[recipe.task].needs_reasons(recipe.matching):
        return ""
    n = sum(record.content.why is not None for record in load_records(recipe, "train", Ledger()))
    if recipe.select is not None and recipe.select.n != "all":
        n = min(n, recipe.select.n)
    return f"{n} pairs with reasons, {MIN_REASONED_PAIRS} are needed" if n < MIN_REASONED_PAIRS else ""


def _leave_out(recipe: Recipe, why: str) -> str:
    """Note in the run folder that its study left the run out."""
    with open_run(recipe, purpose="a note") as run:
        write_json(run / NOT_RUN, {"reason": why})
    return f"{NOT_RUN_STATE}: {why}"


def is_finished(recipe: Recipe) -> bool:
    """Whether the run folder holds this very run, with all stages done."""
    run = recipe.run_folder
    kept = _finished(run)
    if kept is None:
        return False
    then, now = kept["recipe"], recipe.model_dump(mode="json")
    evaluated = owner_of(run) or then  # `sftcore evaluate` may have made the scores again with other settings
    return not (_numbers_differ(then, now) or _numbers_differ(evaluated, now)) and _has_same_files(
        kept, recipe
    )


def _finished(run: Path) -> dict[str, Any] | None:
    """finished.json with its recipe as today's code reads it; None without one, or of an earlier version."""
    path = run / FINISHED
    kept = read_object(path) if path.exists() else {}
    if "files" not in kept:
        return None
    try:
        return {**kept, "recipe": Recipe.model_validate(kept["recipe"]).model_dump(mode="json")}
    except (KeyError, ValidationError):
        return None


def _numbers_differ(then: Any, now: Any, but: Sequence[str] = ()) -> bool:
    """Whether two recipes differ in a key, other than `but`, that changes a number."""
    return any(not is_within(key, (*NUMBERLESS, *but)) for key, _, _ in differences(then, now))


def _has_same_files(kept: dict[str, Any], recipe: Recipe) -> bool:
    now = _files_identity(recipe)
    return bool(kept["files"] == now["files"] and kept.get("model", now["model"]) == now["model"])


def _check_not_stale(recipe: Recipe) -> None:
    """Refuse a finished run that is not this one, unless all that is left to do is to score it again."""
    run = recipe.run_folder
    if not (run / FINISHED).is_file():
        return
    kept = _finished(run)
    if kept is not None and recipe.result_folder.is_dir():
        is_trained = not _numbers_differ(kept["recipe"], recipe.model_dump(mode="json"), but=rescored_keys())
        if is_trained and _has_same_files(kept, Recipe.model_validate(kept["recipe"])):
            return
    other = "other data, another base model or another recipe" if kept else "an earlier version"
    remedy = "choose another folder (--run DIR) or name, or delete the folder to run it again"
    raise UserInputError(Problem(what=f"this run was finished with {other}", where=str(run), remedy=remedy))


def shared_name(kind: str, recipe: Recipe) -> str:
    """Of what runs share: a hash of the recipe sections that it depends on, of the files and of our code."""
    values = recipe.model_dump(mode="json")
    code = [levels.CODE_VERSION] if kind == "levels" else [levels.CODE_VERSION, score.CODE_VERSION]
    sections = next(stage.sections for stage in STAGES.values() if kind in stage.common)
    parts = [{key: values[key] for key in sections}, _files_identity(recipe), AliasTable.load().fingerprint()]
    return f"{kind}-{fingerprint_of([*parts, code])}"


def _files_identity(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of all data and weights, and of all that decides the base model's numbers.

    The second came later; runs that were finished without it count as finished.
    """
    known = KnownDigests(DIGESTS)
    model = {file.name: known.sha256(file) for file in model_files(Path(recipe.model.path))}
    known.save()
    return {"files": fingerprint_of(_digests(recipe)), "model": fingerprint_of(model)}


def _digests(recipe: Recipe) -> list[str]:
    """Checksums of the base model's and the data's files; a hub name stands for itself in the recipe."""
    data, model = recipe.data, Path(recipe.model.path)
    files = sorted([*model.glob("config.json"), *model.glob("*.safetensors")])
    files += [Path(data.relations)] if data.relations else []
    for source in (*data.train, *data.valid, *data.test, *data.ood):
        for path in source_files(source):
            files += sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    known = KnownDigests(DIGESTS)
    digests = [known.sha256(file) for file in files if file.is_file()]
    known.save()
    return digests


def _probe_once(recipe: Recipe, shared: Path | None) -> None:
    """Memory levels in the run folder: probed there, or copied from the folder of runs that share them."""
    from sftcore.stages.prepare import is_probed_now, probe

    run = recipe.run_folder
    if shared is None:
        probe(recipe)
        return
    if is_probed_now(recipe):
        return
    source = shared / shared_name("levels", recipe)
    common = changed(recipe, run=str(source), select=None)
    with folder_lock(source.with_name(f"{source.name}.probing"), purpose="probing", wait=True):
        if not is_probed_now(common):
            probe(common)
    for name in LEVEL_FILES:
        with atomic_file(run / name, "wb") as handle:
            handle.write((source / name).read_bytes())


def _evaluate_once(recipe: Recipe, shared: Path | None) -> None:
    """Scores in the run folder; what runs share of them is copied from there, or to there."""
    own = [recipe.run_folder / "eval" / name for name in STAGES["evaluate"].common]
    common = [shared / shared_name(folder.name, recipe) if shared else None for folder in own]
    for here, there in zip(own, common, strict=True):
        _copy_folder(there, here)
    STAGES["evaluate"].run(recipe)
    for here, there in zip(own, common, strict=True):
        _copy_folder(here, there)


def _copy_folder(source: Path | None, target: Path | None) -> None:
    """Copy `source` to `target` unless that exists; its manifest still decides whether it is of use there."""
    if source is None or target is None or not source.is_dir() or target.exists():
        return
    with atomic_folder(target, keep_existing=True) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
