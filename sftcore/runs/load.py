"""The recipe that every command and every notebook begins with.

In: a recipe's path, or the folder of a run; what is changed of it. Out: a checked recipe with its run folder,
its dtype and its rate decided.
Invariant: what is wrong with the recipe or the folder is refused before anything is written.
Trade-off: a model that is neither here nor to be had is refused here, not when it is first read: one look
at the disk (1 ms).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.hub import require_hub
from sftcore.paths import folder_fault
from sftcore.recipe import load_recipe as read_recipe
from sftcore.run_recipe import RECIPE, check_beside_recipe, read_run_recipe
from sftcore.runs.claim import with_run
from sftcore.runs.given import require_run
from sftcore.runs.settle import settle


def load_recipe(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    run: Path | str | None = None,
    on: str = "debug",
    has_gpu: bool = False,
    resume: str = "auto",
) -> Recipe:
    """A recipe or a run folder's, ready for every stage.

    Args:
        overrides: "a.b=c" strings, as `--set` takes them.
        run: its run folder, if not runs/NAME.
        on: where it goes: debug (this process), node or slurm; see `settle`.
        has_gpu: it goes to GPUs, whatever this machine has.
        resume: the checkpoint to go on from, which decides the dtype.

    Raises:
        UserInputError: what is wrong with the recipe, or with the run folder; no folder for the run.
        MissingEnvironmentError: it runs here, and its model is neither here nor to be had.
    """
    path = Path(path)
    is_run = os.path.isdir(path)  # which no odd path makes raise
    if is_run:
        require_run(path)
        read_run_recipe(path)  # refuses other folders, and recipes that were damaged
    recipe = read_recipe(path / RECIPE if is_run else path, list(overrides))
    run = run or (path if is_run else None)
    folder = Path(run) if run else recipe.run_folder
    if fault := folder_fault(folder):
        what, remedy = f"can't be a run folder: {fault}", "choose another: --run DIR"
        raise UserInputError(Problem(what=what, where=str(folder), remedy=remedy))
    recipe = with_run(recipe, None if run is None else str(run))
    if not is_run:
        check_beside_recipe(recipe.run_folder, [path])
    if on != "slurm":
        require_hub([recipe])
    return settle(recipe, on=on, has_gpu=has_gpu, resume=resume)
