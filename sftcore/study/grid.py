"""A study: one recipe and a grid of values -> runs, each with a name, a recipe and a folder.

In: STUDY.yaml (`base`, `set`, `grid`, `draws`). Out: `StudyRun`s in a fixed order: the grids in turn, a
grid's keys from the last to the first, draws fastest.
Invariant: names are unique and hold the grid's keys, all of them, so that a value more on an axis renames no
run; a study that expands has only valid recipes; every mistake in any of them is reported at once.
Trade-off: each run's recipe is read and checked by itself (10 ms), so nothing is found out at run 200.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from sftcore.config import Recipe
from sftcore.errors import MAX_PROBLEMS, Problem, UserInputError
from sftcore.paths import file_fault
from sftcore.recipe import load_recipe
from sftcore.settings import MAX_COUNT, FolderName, PathText, Settings
from sftcore.wrong_values import UNKNOWN, Misfit, misfits
from sftcore.yaml_text import read_yaml

DRAW = "select.draw"
MAX_VALUE_LETTERS = 24
MAX_RUNS = 10_000  # 100 s to check; nobody runs more
ONCE_EACH = "give all grids of the list the same keys, and each combination once"
Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
OWN_FOLDERS = ("recipes", "logs", "shared", "slurm")  # of a study's folder, next to its runs


def _as_list(grid: Any) -> Any:
    return [grid] if isinstance(grid, dict) else grid


class StudySettings(Settings):
    """A STUDY.yaml."""

    name: FolderName = Field("study", description="the study's name; its folder is runs/NAME")
    base: PathText = Field(description="recipe; relative to the study, then to here")
    set: dict[str, Any] = Field({}, description="dotted recipe key -> its value in all runs; not in names")
    grid: Annotated[list[Grid], Field(min_length=1), BeforeValidator(_as_list)] = Field(
        [{}], description="dotted recipe key -> values; every combination is a run. A list: of each, in turn"
    )
    draws: Annotated[int, Field(gt=0, le=MAX_COUNT)] = Field(
        1, description="runs per combination, with select.draw = 0, 1, ..."
    )
    keep_models: bool = Field(
        True, description="keep each finished run's weights (checkpoints go in any case)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One run of a study.

    Args:
        name: such as `n-60_levels-2_draw-0`; also its folder's name.
        cell: dotted key -> value of this run.
        recipe: resolved, with its run folder.
    """

    name: str
    cell: dict[str, Any]
    recipe: Recipe


def read_study(path: Path) -> StudySettings:
    """Read a STUDY.yaml; its name defaults to the file's.

    Raises:
        UserInputError: no such file, not YAML, unknown keys or wrong values (all of them), no such base.
    """
    if file_fault(path) == "no such file":
        raise UserInputError(Problem(what="no such study", where=str(path)))
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserInputError(Problem(what="a study is a YAML mapping", where=str(path)))
    try:
        settings = StudySettings.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        raise UserInputError(*(_explain(item, path) for item in misfits(error.errors()))) from error
    candidates = [path.resolve().parent / settings.base, Path(settings.base).resolve()]
    found = [candidate for candidate in candidates if not file_fault(candidate)]
    if not found:
        raise UserInputError(Problem(what="no such recipe", where=f"{path}: base", got=settings.base))
    return settings.model_copy(update={"base": str(found[0])})


def _explain(misfit: Misfit, path: Path) -> Problem:
    where = f"{path}: {'.'.join(map(str, misfit.location))}"
    allowed = ", ".join(StudySettings.model_fields) if misfit.kind == UNKNOWN else misfit.allowed
    return Problem(what=misfit.what, where=where, got=misfit.got, allowed=allowed, remedy=misfit.remedy)


def expand(settings: StudySettings, folder: Path) -> list[StudyRun]:
    """Every run of a study, in order.

    Args:
        folder: of the study; runs get folders in it.

    Raises:
        UserInputError: every mistake of any run's recipe, each once.
    """
    runs: list[StudyRun] = []
    problems: list[Problem] = []
    _check_size(settings)
    cells = [named for grid in settings.grid for named in expand_cells(grid, settings.draws)]
    _check_common_keys(settings)
    twice = sorted(name for name, count in Counter(name for name, _ in cells).items() if count > 1)
    if twice:
        raise UserInputError(
            Problem(what="runs of the same name", where="grid", got=", ".join(twice), remedy=ONCE_EACH)
        )
    for name, cell in cells:
        overrides = [f"{key}={_as_yaml(value)}" for key, value in (settings.set | cell).items()]
        overrides += [f"name={json.dumps(name)}", f"run={json.dumps(str(folder / name))}"]
        try:
            runs.append(StudyRun(name=name, cell=cell, recipe=load_recipe(Path(settings.base), overrides)))
        except UserInputError as error:
            problems += [problem for problem in error.problems if problem not in problems]
        if len(problems) > MAX_PROBLEMS:
            break
    if problems:
        raise UserInputError(*problems)
    return runs


def _check_size(settings: StudySettings) -> None:
    """Refuse more runs than anybody means, before they are expanded."""
    num_runs = settings.draws * sum(math.prod(map(len, grid.values())) for grid in settings.grid)
    if num_runs > MAX_RUNS:
        got, allowed = f"{num_runs:,} runs", f"{MAX_RUNS:,}"
        raise UserInputError(Problem(what="too many runs", where="grid, draws", got=got, allowed=allowed))


def _as_yaml(value: Any) -> str:
    """A value as an override says it: JSON, in which YAML finds what it does not know (a date) as text."""
    return json.dumps(value, default=str)


def _check_common_keys(settings: StudySettings) -> None:
    """Refuse keys of `set` that something else decides."""
    own = {"name", "run"} | ({DRAW} if settings.draws > 1 else set())
    varied = own | {key for grid in settings.grid for key in grid}
    decided = [key for key in settings.set if any(_overlap(key, other) for other in varied)]
    if decided:
        what = "keys that the study itself decides, or that are in its grid, too"
        raise UserInputError(Problem(what=what, where="set", got=", ".join(decided)))


def _overlap(key: str, other: str) -> bool:
    """Whether one of two dotted keys is, or holds, the other.

    >>> _overlap("train", "train.lr"), _overlap("train.lr", "train.lr_end")
    (True, False)
    """
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def expand_cells(grid: Grid, draws: int) -> list[tuple[str, dict[str, Any]]]:
    """(name, {dotted key: value}) of every combination.

    >>> [name for name, cell in expand_cells({"select.n": [60, 240], "select.levels": [[2]]}, 1)]
    ['n-60_levels-2', 'n-240_levels-2']
    """
    axes = {**grid, **({DRAW: list(range(draws))} if draws > 1 else {})}
    labels = {key: value_labels(values) for key, values in axes.items()}
    keys = _short_keys(list(axes))
    combinations = itertools.product(*(range(len(values)) for values in axes.values()))
    return [
        (
            "_".join(f"{keys[k]}-{labels[k][i]}" for k, i in zip(axes, positions, strict=True)) or "run",
            {k: axes[k][i] for k, i in zip(axes, positions, strict=True)},
        )
        for positions in combinations
    ]


def value_labels(values: list[Any]) -> list[str]:
    """A short word for each value of an axis, fit for a folder's name; its position where that fails.

    >>> value_labels([[2], [0, 1, 2]]), value_labels([1e-5, 0.5]), value_labels([{"a": 1}, {"a": 2}])
    (['2', '0-1-2'], ['1e-05', '0.5'], ['v0', 'v1'])
    """
    labels = [_label(value) for value in values]
    fit = all(labels) and len(set(labels)) == len(labels) and max(map(len, labels)) <= MAX_VALUE_LETTERS
    return labels if fit else [f"v{position}" for position in range(len(values))]


def _label(value: Any) -> str:
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return "-".join(_label(item) for item in value)
    if isinstance(value, dict | list):
        return ""
    return re.sub(r"[^\w.]+", "-", str(value)).strip("-")


def _short_keys(keys: list[str]) -> dict[str, str]:
    """The last word of each dotted key, or all of it where two keys end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: word if last.count(word) == 1 else key.replace(".", "-")
        for key, word in zip(keys, last, strict=True)
    }
