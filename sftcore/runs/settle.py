"""`model.dtype: auto` becomes a dtype, once for a run; `train.lr: auto` stays what it was for a run.

In: a recipe with its run folder. Out: the same recipe with "bfloat16" or "float32" in it; a warning where a
dtype was asked for by name that is slow here.
Invariant: a run, and a study's runs of one model, keep the dtype of the first RUN/recipe.yaml, on whatever
machine they go on.
Trade-off: a job on nodes without GPUs leaves `auto` to its first process, since a login node's CPU says
nothing about theirs; ranks take rank 0's answer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_object
from sftcore.recipe import changed
from sftcore.runs.claim import owner_of

if TYPE_CHECKING:
    from sftcore.study.grid import StudyRun

log = logging.getLogger("sftcore.precision")
AUTO = "auto"
STATE = "state.json"  # of a checkpoint; its module imports DeepSpeed


def settle(recipe: Recipe, *, on: str = "debug", has_gpu: bool = False, resume: str = AUTO) -> Recipe:
    """The recipe with its model's dtype decided, by its run folder if that has begun, else by the hardware.

    A checkpoint that is named decides before the hardware.

    A learning rate that the recipe leaves to us stays that of a run folder that has begun, too.

    Args:
        on: debug (this process), node (ranks of this machine) or slurm.
        has_gpu: it goes to GPUs, or is planned for some, whatever this machine has.
        resume: auto, never, or the checkpoint to go on from.
    """
    recipe = with_kept_rate(recipe)
    if recipe.model.dtype == AUTO:
        named = None if resume in (AUTO, "never") else dtype_of_checkpoint(Path(resume))
        return with_dtype(recipe, _kept(recipe) or named or _by_hardware(on, has_gpu=has_gpu))
    is_said_here = on == "debug"  # by rank 0 of several, not by who starts them
    if recipe.model.dtype == "bfloat16" and is_said_here and not has_gpu:
        _warn_if_slow()
    return recipe


def settle_runs(runs: Sequence[StudyRun], *, on: str = "here", has_gpu: bool = False) -> list[StudyRun]:
    """The runs of a study, each model's in one dtype: that of a run that has begun, if any has."""
    runs = [replace(run, recipe=with_kept_rate(run.recipe)) for run in runs]
    kept: dict[str, str] = {}
    undecided = [run.recipe for run in runs if run.recipe.model.dtype == AUTO]
    for recipe in undecided:
        if recipe.model.path not in kept and (dtype := _kept(recipe)):
            kept[recipe.model.path] = dtype
    here = _by_hardware(on, has_gpu=has_gpu) if undecided else AUTO
    return [
        replace(run, recipe=with_dtype(run.recipe, kept.get(run.recipe.model.path, here)))
        if run.recipe.model.dtype == AUTO
        else run
        for run in runs
    ]


def with_dtype(recipe: Recipe, dtype: str) -> Recipe:
    """The recipe with another model.dtype."""
    return changed(recipe, **{"model.dtype": dtype})


def with_kept_rate(recipe: Recipe) -> Recipe:
    """The recipe with the rate of a run folder that began with its kind of adapter, if it says none."""
    if recipe.says_lr:
        return recipe
    owner: dict[str, Any] = owner_of(recipe.run_folder) or {}
    rate = owner.get("train", {}).get("lr", AUTO)
    if rate == AUTO or owner.get("adapter", {}).get("kind", "none") != recipe.adapter.kind:
        return recipe
    return changed(recipe, **{"train.lr": float(rate)})


def dtype_of_checkpoint(folder: Path) -> str | None:
    """In which dtype a checkpoint's model was held; None if neither it nor its run's recipe says so.

    Damage is for training to tell.
    """
    with contextlib.suppress(UserInputError):
        if dtype := read_object(folder / STATE).get("dtype"):
            return str(dtype)
    with contextlib.suppress(UserInputError):
        return _dtype_in(owner_of(folder.resolve().parent.parent))
    return None


def check_dtype(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint in another dtype.

    Raises:
        UserInputError: with both.
    """
    from sftcore.precision import dtype_of

    held, asked = dtype_of_checkpoint(checkpoint), dtype_of(recipe.model)
    if held is not None and held != asked:
        raise UserInputError(
            Problem(
                what="this checkpoint is of a model in another dtype",
                where=str(checkpoint),
                got=f"model.dtype {asked}",
                allowed=f"model.dtype {held}",
                remedy=f"set model.dtype: {held}, or begin with a result's weights: model.path RUN/model",
            )
        )


def _kept(recipe: Recipe) -> str | None:
    """The dtype that RUN/recipe.yaml names; None if there is none yet."""
    return _dtype_in(owner_of(recipe.run_folder))


def _dtype_in(owner: dict[str, Any] | None) -> str | None:
    dtype = (owner or {}).get("model", {}).get("dtype", AUTO)
    return None if dtype == AUTO else str(dtype)


def _by_hardware(on: str, *, has_gpu: bool) -> str:
    if has_gpu:
        return "bfloat16"
    if on == "slurm":
        return AUTO
    from sftcore.precision import dtype_here

    return dtype_here()


def _warn_if_slow() -> None:
    from sftcore import dist
    from sftcore.precision import dtype_here

    if dist.rank() == 0 and dtype_here() != "bfloat16":
        log.warning(
            "model.dtype: bfloat16 is emulated by this CPU, several times slower than float32 (sftcore doctor"
            " measures both): leave it at auto, or set float32"
        )
