"""What a path on the command line is, where a command takes another thing.

In: the path and the command's name. Out: nothing, or a reason in one sentence with the right next command.
Invariant: a recipe given for a run folder, or any folder given for a recipe, is called what it is.
Trade-off: the recipe's name is read from its YAML alone, unchecked (5 ms): a recipe with mistakes still tells
where its run would lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftcore.errors import Problem, UserInputError
from sftcore.run_recipe import RECIPE
from sftcore.yaml_text import read_yaml

RECIPES = (".yaml", ".yml")


def require_folder(path: Path, command: str) -> None:
    """Refuse a file, such as a recipe, where a command takes the folder of a run or model.

    Raises:
        UserInputError: with the folder that was meant.
    """
    if path.is_dir():
        return
    where = str(path)
    if not path.is_file():
        remedy = "give the folder of a run (runs/NAME), as `sftcore train` makes it"
        raise UserInputError(Problem(what="no such folder", where=where, remedy=remedy))
    takes = f"`sftcore {command}` takes the folder of"
    if path.suffix.lower() not in RECIPES:
        remedy = f"sftcore {command} runs/NAME"
        raise UserInputError(Problem(what=f"this is a file; {takes} a run", where=where, remedy=remedy))
    raw = _read(path)
    is_study = "base" in raw
    kind, make = ("study", "study") if is_study else ("recipe", "train")
    folder = _folder_of(raw, path.stem if is_study else "run")
    first = "" if Path(folder).is_dir() else f"first sftcore {make} {path}, then "
    raise UserInputError(
        Problem(
            what=f"this is a {kind}; {takes} its run{'s' if is_study else ''}",
            where=where,
            remedy=f"{first}sftcore {command} {folder}",
        )
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except UserInputError:  # whatever is wrong with it, it is no folder
        return {}
    return raw if isinstance(raw, dict) else {}


def _folder_of(raw: dict[str, Any], name: str) -> str:
    return str(raw.get("run") or f"runs/{raw.get('name', name)}")


def require_run(folder: Path) -> None:
    """Refuse a folder that is no run's where a command takes a recipe or a run.

    Raises:
        UserInputError: with the recipes or runs that are in it.
    """
    if (folder / RECIPE).exists():
        return
    recipes = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in RECIPES]
    runs = sorted(file.parent for file in folder.glob(f"*/{RECIPE}"))
    remedy = "give a recipe (a YAML file; see recipes/ for some to copy), or the folder of a run"
    if found := recipes or runs:
        kind = "a recipe" if recipes else "a run"
        remedy = f"give {kind} in it, such as {', '.join(map(str, found[:3]))}"
    raise UserInputError(Problem(what=f"not a run folder: no {RECIPE}", where=str(folder), remedy=remedy))
