"""RUN/recipe.yaml: the recipe that explains what a run folder holds, and whose folder it is.

In: a run folder. Out: the recipe as written there, or a message that names the file.
Invariant: a recipe that was cut, damaged or edited since it was written is refused, never half used: its
first line, a comment, holds the checksum of the lines below it.
Trade-off: recipes of versions without that line are taken as they are; they are known by what else the
folder holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file, read_object
from sftcore.recipe import dump_recipe
from sftcore.yaml_text import parse_yaml

RECIPE = "recipe.yaml"
SEAL = "# written by sftcore; sha256 of the lines below: "
ENVIRONMENT = "environment.json"
ELSEWHERE = "choose another folder for the run: --run DIR, or `name:` in the recipe"
WRITTEN = (  # what a run writes over, or takes for its own
    *(RECIPE, "plan.json", "metrics.jsonl", "valid.jsonl", ENVIRONMENT),
    *("selection.jsonl", "selection.manifest.json", "checkpoints", "model", "adapter", "best"),
    *("report.html", "report.json", "run.log", "finished.json"),
)


def write_run_recipe(run: Path, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml with its seal."""
    text = dump_recipe(recipe)
    with atomic_file(run / RECIPE) as handle:
        handle.write(f"{SEAL}{_sha256(text)}\n{text}")


def read_run_recipe(run: Path) -> dict[str, Any]:
    """RUN/recipe.yaml as it stands there, without defaults of keys that its version did not have.

    Raises:
        UserInputError: there is none, or it is damaged.
    """
    path = run / RECIPE
    if not path.exists():
        remedy = "give the folder of a run (runs/NAME), as `sftcore train`, `probe` or `evaluate` makes it"
        raise UserInputError(Problem(what=f"not a run folder: no {RECIPE}", where=str(run), remedy=remedy))
    remedy = "put the recipe of this run back; if the change is meant, take the first line out"
    try:
        text = path.read_bytes().decode()
        _check_seal(text, path)
        recipe = parse_yaml(text)
    except OSError as error:
        what = f"can't be read: {error.strerror}"
        raise UserInputError(Problem(what=what, where=str(path), remedy=remedy)) from error
    except ValueError as error:
        what = f"not valid YAML: {error}"
        raise UserInputError(Problem(what=what, where=str(path), remedy=remedy)) from error
    if not isinstance(recipe, dict):
        got = type(recipe).__name__
        raise UserInputError(Problem(what="must be a mapping", where=str(path), got=got, remedy=remedy))
    return recipe


def _check_seal(text: str, path: Path) -> None:
    first, _, below = text.partition("\n")
    if first.startswith(SEAL) and first.removeprefix(SEAL) != _sha256(below):
        raise UserInputError(
            Problem(
                what="was changed or damaged since it was written",
                where=str(path),
                remedy="put the recipe of this run back; if the change is meant, take the first line out",
            )
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_run_folder(folder: Path) -> bool:
    """Whether sftcore wrote the recipe.yaml of a folder, as far as one can tell."""
    with suppress(OSError), open(folder / RECIPE, encoding="utf-8", errors="replace") as handle:
        if handle.read(len(SEAL)) == SEAL:
            return True
    with suppress(UserInputError):  # of a version without seals
        return "sftcore" in read_object(folder / ENVIRONMENT)
    return False


def check_free_for_run(folder: Path) -> None:
    """Refuse a run folder that is somebody's own: what a run writes would go over their files.

    Raises:
        UserInputError: it is no folder, or holds files of those names that no run wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise UserInputError(Problem(what="the run folder is a file", where=str(folder), remedy=ELSEWHERE))
    if is_run_folder(folder):
        return
    foreign = [name for name in WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if foreign:
        raise UserInputError(
            Problem(
                what="this folder holds files that no run of sftcore wrote, and a run would write over",
                where=str(folder),
                got=", ".join(foreign),
                remedy=ELSEWHERE,
            )
        )


def check_beside_recipe(run: Path, recipes: Sequence[Path]) -> None:
    """Refuse the folder of one of these recipe files as a run folder, unless the run itself wrote it there.

    Raises:
        UserInputError: it is.
    """
    for recipe in recipes:
        is_own = recipe.name == RECIPE and is_run_folder(run)
        if recipe.resolve().parent == run.resolve() and not is_own:
            what = "the run folder is the folder of the recipe, whose files a run would write over"
            raise UserInputError(Problem(what=what, where=str(run), got=str(recipe), remedy=ELSEWHERE))
