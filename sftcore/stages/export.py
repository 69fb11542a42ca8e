"""`sftcore export`: a finished run -> a folder to hand on.

In: a run folder. Out: a copy of its model or adapter, or base and adapter merged.
Invariant: the folder appears whole or not at all, and never over an existing one.
Trade-off: a copy (seconds a gigabyte), not a link, so that the run can be deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_folder
from sftcore.model.adapters import is_adapter
from sftcore.model.code import local_folder
from sftcore.model.identity import CODE, TERMS, base_of
from sftcore.model.merge import merge_adapter
from sftcore.model.weight_files import check_unchanged
from sftcore.recipe import changed
from sftcore.run_recipe import read_run_recipe
from sftcore.train.model_card import write_card


def export_run(run: Path, to: Path, *, merge: bool) -> None:
    """Write a run's result into `to`.

    Raises:
        UserInputError: no finished run there, nothing to merge, or `to` exists.
        MissingEnvironmentError: the disk is full.
    """
    recipe = Recipe.model_validate(read_run_recipe(run))
    recipe = changed(recipe, run=str(run))
    result = run / recipe.result_folder.name
    if not result.is_dir():
        remedy = "finish it: sftcore train RECIPE"
        raise UserInputError(Problem(what="this run has no result yet", where=str(run), remedy=remedy))
    if to.exists():
        raise UserInputError(Problem(what="this folder exists", where=f"--to {to}", remedy="name a new one"))
    check_unchanged(result)
    if not merge:
        with atomic_folder(to) as temporary:
            shutil.copytree(result, temporary, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            write_card(recipe, temporary)  # again: the run may have been evaluated since
        return
    if not is_adapter(result):
        remedy = "leave --merge out"
        raise UserInputError(Problem(what="this run trained all weights", where=str(run), remedy=remedy))
    base = local_folder(base_of(result), ("*.json", "*.safetensors", *CODE, *TERMS))
    settings = recipe.model.model_copy(update={"path": str(base)})
    quantised = recipe.adapter.kind == "qlora"
    merge_adapter(
        result, to, settings, quantised=quantised, describe=lambda folder: write_card(recipe, folder)
    )
