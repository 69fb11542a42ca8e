"""The run folder: who owns it, which recipe it belongs to, what is done, on what machine.

In: a resolved recipe. Out: RUN/recipe.yaml, RUN/environment.json, a lock while a stage writes.
Invariant: recipe.yaml explains what the folder holds: a key that its weights or memory levels depend on is
refused with another value, by name; every other one is written again.
Trade-off: what a result depends on is known by recipe key, not by tracing values, so `data.template` counts
for weights even where no sample would change; a new run name costs a word.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sftcore.config import Recipe
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import DAMAGED, disk_errors_explained, folder_lock, read_object, write_json
from sftcore.leftovers import remove, remove_leftovers
from sftcore.log import log_to_file
from sftcore.recipe import changed
from sftcore.run_recipe import ENVIRONMENT, RECIPE, check_free_for_run, read_run_recipe, write_run_recipe
from sftcore.stages.stage import HELD_OUT, STAGES, begun, is_within, rescored_keys

log = logging.getLogger("sftcore.run_folder")
JOBS = ("logs", "slurm")  # folders of jobs, in which files are written by rename as in those of stages
MADE_AT_ONCE = {RECIPE, ENVIRONMENT, "run.log", "lease.json", ".lock"}  # of a run folder that was only opened
FINISHED = "finished.json"  # of `sftcore run`: all stages are done
PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "numpy", "peft", "datasets")


@contextmanager
def open_run(recipe: Recipe, *, purpose: str, shared: bool = False) -> Iterator[Path]:
    """Lock the run folder, claim it for this recipe, and log into RUN/run.log while the block runs.

    Args:
        shared: next to others that share it (shards), each with a folder of its own to write to.

    Raises:
        UserInputError: in use by another process; it belongs to another recipe, or to no run.

    A refusal in the block leaves no folder that was not there before.
    """
    run = recipe.run_folder
    check_free_for_run(run)
    before = [folder for folder in (run, *run.parents) if folder.exists()]
    try:
        with _opened(recipe, purpose=purpose, shared=shared):
            yield run
    except (UserInputError, MissingEnvironmentError):
        if before and run not in before and not shared:
            _forget(run, up_to=before[0])
        raise


def _forget(run: Path, *, up_to: Path) -> None:
    """Remove a run folder that a refusal left, and the folders made for it, if nothing of use is in them."""
    found = list(run.iterdir())
    if all(path.name in MADE_AT_ONCE or (path.is_file() and not path.stat().st_size) for path in found):
        remove(run)
        for folder in run.parents[: run.parents.index(up_to)]:
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()


@contextmanager
def _opened(recipe: Recipe, *, purpose: str, shared: bool) -> Iterator[Path]:
    """The run folder, locked and claimed."""
    run = recipe.run_folder
    with folder_lock(run, purpose=purpose, shared=shared) as is_held, ExitStack() as stack:
        if is_held and not shared:
            sweep(run)
        claim(run, recipe)
        with disk_errors_explained(run):
            stack.enter_context(log_to_file(run / "run.log"))
        yield run


def sweep(run: Path) -> None:
    """Remove what killed processes left in a run folder; for the holder of its lock.

    Temporaries that a living process writes (a report needs no lock) stay.
    """
    written = [pattern for stage in STAGES.values() for pattern in stage.folders]
    for folder in (run, *(path for name in (*written, *JOBS) for path in run.glob(name) if path.is_dir())):
        remove_leftovers(folder)
    for path in run.glob("checkpoints/*"):
        is_whole = path.name.startswith("step-") and (path / "COMMITTED").exists()
        if path.match(".step-*.tmp") or (path.match("step-*") and path.is_dir() and not is_whole):
            log.info("removing %s: the save was interrupted", path)
            remove(path)


def claim(run: Path, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml; refuse a recipe that weights or levels in the folder do not come from.

    An attempt that ended before its first step, or a selection (drawn again by each prepare), claims nothing.

    Raises:
        UserInputError: naming every key that differs and counts, with both values.
    """
    owner = owner_of(run)
    is_begun = owner is not None and bool(begun(run))
    if is_begun:
        differing = differences(owner, recipe.model_dump(mode="json"))
        if refused := [item for item in differing if _counts(item[0], run, recipe)]:
            raise UserInputError(*(_differs(run, recipe, *item) for item in refused))
        if not differing:
            return
        if recipe.result_folder.is_dir() and any(is_within(key, HELD_OUT) for key, _, _ in differing):
            log.warning(
                "other held-out data than these weights were trained without: see that no item leaked"
            )
    write_run_recipe(run, recipe)
    if not is_begun or not (run / ENVIRONMENT).is_file():
        write_json(run / ENVIRONMENT, describe_environment() | describe_origin(recipe))


def _counts(key: str, run: Path, recipe: Recipe) -> bool:
    """Whether something in the folder depends on a key.

    Held-out data count until the weights are there: training leaves out what they ask, so that another test
    set is another plan, which a checkpoint doesn't resume. A study that drops weights can't score them again.
    """
    is_trained = recipe.result_folder.is_dir()
    if (run / FINISHED).is_file() and not is_trained and is_within(key, rescored_keys()):
        return True
    return any(stage.refuses(key, is_done=is_trained) for stage in begun(run))


def owner_of(run: Path) -> dict[str, Any] | None:
    """RUN/recipe.yaml, with the defaults of keys that its version did not have; None if absent."""
    if not (run / RECIPE).exists():
        return None
    owner = read_run_recipe(run)
    try:
        return Recipe.model_validate(owner).model_dump(mode="json")
    except ValidationError as error:
        if not isinstance(owner.get("model"), dict):
            raise UserInputError(
                Problem(what="names no model", where=str(run / RECIPE), remedy=DAMAGED)
            ) from error
        return owner


def _differs(run: Path, recipe: Recipe, key: str, old: Any, new: Any) -> Problem:
    ways = ["choose another name or --run DIR"]
    if recipe.result_folder.is_dir():
        model = f"--model {recipe.result_folder}"
        ways.append(f"score these weights there: sftcore evaluate RECIPE --run DIR {model}")
    elif is_within(key, rescored_keys()):
        ways.append("evaluate under it once the weights are there")
    return Problem(
        what=f"this run folder holds results of a recipe with another {key}",
        where=str(run),
        got=json.dumps(new, ensure_ascii=False)[:200],
        allowed=json.dumps(old, ensure_ascii=False)[:200],
        remedy="; or ".join(ways),
    )


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    [('a.c', 2, 3)]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        found = [differences(old.get(key), new.get(key), f"{prefix}{key}.") for key in keys]
        return [item for items in found for item in items]
    return [] if old == new else [(prefix.rstrip("."), old, new)]


def record_seconds(run: Path, stage: str, seconds: float) -> None:
    """Add a stage's wall time to RUN/environment.json."""
    path = run / ENVIRONMENT
    try:
        environment = read_object(path)
    except UserInputError as error:  # notes, for which no result is lost
        log.warning("%s is damaged: written again (%s)", ENVIRONMENT, str(error).splitlines()[0])
        remove(path)
        environment = describe_environment()
    write_json(path, environment | {f"{stage}_seconds": round(seconds, 1)})


def describe_environment() -> dict[str, Any]:
    """Versions, commit and hardware; needs no torch."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        **versions,
        "sftcore": metadata.version("sftcore"),
        "commit": _commit(),
        "processor": _processor(),
        "num_processors": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "machine_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def describe_origin(recipe: Recipe) -> dict[str, Any]:
    """What `sftcore model pull` noted of the weights' quantisation, if anything."""
    path = Path(recipe.model.path) / "origin.json"
    quantisation = read_object(path).get("quantisation") if path.is_file() else None
    return {"quantised_weights": quantisation} if quantisation else {}


def _commit() -> str:
    """Commit of the checkout that this code runs from, with + if it has changes; empty outside a checkout."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def with_run(recipe: Recipe, run: str | None) -> Recipe:
    """The recipe with `--run DIR` applied; an absolute path, so that it holds from any folder."""
    return recipe if run is None else changed(recipe, run=str(Path(run).resolve()))
