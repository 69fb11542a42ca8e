"""The run folder: who owns it, which recipe it belongs to, what is done, on what machine.

In: a resolved recipe. Out: RUN/recipe.yaml, RUN/environment.json, a lock while a stage writes.
Invariant: a run folder belongs to one recipe; another recipe on it is refused with the keys that differ.
Trade-off: any differing key is refused but the few of `FREE_KEYS`; editing a recipe means a new run name,
which costs a word and keeps every number in a folder explained by the recipe beside it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file, folder_lock, read_json, write_json
from sftcore.log import log_to_file
from sftcore.recipe import dump_recipe

FREE_KEYS = (
    "run",
    "tracking.tensorboard",
    "checkpoint.keep",
)  # change nothing that a run's numbers depend on
NO_RESULTS = {
    "recipe.yaml",
    "environment.json",
    "run.log",
    ".lock",
    "check.txt",
    "check.json",
    "check.png",
    "attempts.jsonl",
    "failed.json",
    "not_run.json",
    "lease.json",
    "logs",
    "run.pids",
    "slurm",
    "ledger.train.jsonl",
    "ledger.test.jsonl",
    "ledger.ood.jsonl",
}  # left by an attempt that failed at once
PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "numpy", "peft", "datasets")


@contextmanager
def open_run(recipe: Recipe, *, purpose: str, shared: bool = False) -> Iterator[Path]:
    """Lock the run folder, claim it for this recipe, and log into RUN/run.log while the block runs.

    Args:
        shared: beside others that share it (shards), each with a folder of its own to write to.

    Raises:
        UserInputError: in use by another process, or it belongs to another recipe.
    """
    run = recipe.run_folder
    with folder_lock(run, purpose=purpose, shared=shared):
        claim(run, recipe)
        with log_to_file(run / "run.log"):
            yield run


def claim(run: Path, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml, or check that it is this recipe; a folder without results changes hands.

    Raises:
        UserInputError: it is another one; every differing key is named with both values.
    """
    path = run / "recipe.yaml"
    if path.is_file() and any(file.name not in NO_RESULTS for file in run.iterdir()):
        owner = _as_read_today(yaml.safe_load(path.read_text(encoding="utf-8")))
        differing = [d for d in differences(owner, recipe.model_dump(mode="json")) if d[0] not in FREE_KEYS]
        if differing:
            raise UserInputError(*(_differs(run, key, old, new) for key, old, new in differing))
        return
    with atomic_file(path) as handle:
        handle.write(dump_recipe(recipe))
    write_json(run / "environment.json", describe_environment() | describe_origin(recipe))


def _as_read_today(owner: Any) -> Any:
    """A recipe of another version with the defaults of keys that it did not have then, if it can be read."""
    try:
        return Recipe.model_validate(owner).model_dump(mode="json")
    except ValidationError:
        return owner


def _differs(run: Path, key: str, old: Any, new: Any) -> Problem:
    return Problem(
        what=f"this run folder belongs to a recipe with another {key}",
        where=str(run),
        got=json.dumps(new, ensure_ascii=False)[:200],
        allowed=json.dumps(old, ensure_ascii=False)[:200],
        remedy="choose another name or --run DIR, or delete the folder",
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
    path = run / "environment.json"
    environment = read_json(path)
    environment[f"{stage}_seconds"] = round(seconds, 1)
    write_json(path, environment)


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
    quantisation = read_json(path).get("quantisation") if path.is_file() else None
    return {"quantised_weights": quantisation} if quantisation else {}


def _commit() -> str:
    """Commit of the checkout that this code runs from, with + if it has changes; empty outside a checkout."""
    root = Path(__file__).parent.parent
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
    return recipe if run is None else recipe.model_copy(update={"run": str(Path(run).resolve())})
