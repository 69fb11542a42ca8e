"""The folder of a QA study, parsed: its run folders, and the base model's scores that they share.

In: a folder whose subfolders are run folders (`sftcore study` makes such). Out: `StudyFiles`.
Invariant: a run counts only if its predictions, its selection and its recipe are there and agree with each
other; the others are named, never guessed at. Two runs are draws of one cell only if their recipes differ in
nothing but name, folder and draw.
Trade-off: predictions of all runs are held at once (300,000 rows for 252 runs of 1,200 items), so that items
can be paired across runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sftcore.data.selection_file import SELECTION, read_selection
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.constant import constant_rows
from sftcore.evaluate.score import LEVELS, score
from sftcore.fsio import read_jsonl, read_object
from sftcore.knowledge.level_files import LEVELS_MANIFEST
from sftcore.run_recipe import RECIPE, read_run_recipe
from sftcore.study.run_folder import PREDICTIONS
from sftcore.study.table import Run, StudyTable, check_same_items, differing_keys, read_table, run_folders
from sftcore.study.wording import flatten, format_setting

MIXED, DIVIDED = "mixed", "divided"  # of several levels, as many as come, or equal shares
DRIFT = "eval/drift.json"
KIND = "adapter.kind"
NO_AXES = (  # of a recipe: what a draw is, what a cell's size and levels tell, what the fingerprint tells
    "name",
    "run",
    "model.path",
    "select.draw",
    "select.n",
    "select.levels",
    KIND,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelRun(Run):
    """A run that was trained on facts of chosen memory levels; `metrics` are of eval/drift.json.

    Args:
        level: memory level that they are from, "0".."4", or several, as `name_levels` has it.
        variant: the adapter and those settings in which the study's runs differ, in words; "" if nothing.
        model: fingerprint of the base model, or its path where the levels don't tell.
        constant: of its splits, what always giving a relation's most frequent selected answer gets: rows.
    """

    level: str
    variant: str = ""
    model: str
    constant: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def adapter(self) -> str:
        """ "none" or the adapter's kind."""
        return str(self.recipe.get(KIND, "none"))

    @property
    def draw(self) -> int:
        """Number of the draw."""
        return int(self.recipe.get("select.draw", 0))

    @property
    def drift(self) -> float | None:
        """Mean KL of first tokens in nats, if measured."""
        return self.metrics.get("mean_kl_nats")

    @property
    def drift_level(self) -> int | None:
        """Of the facts that it was measured on."""
        return self.metrics.get("level")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFiles(StudyTable[LevelRun]):
    """A study: its table, in a fixed order, and what the runs share.

    Args:
        others: "base" and "fewshot" -> scores, where a run has them.
        levels: rows of levels.jsonl.
        probe: content of levels.manifest.json.
        recipe: of the first run.
    """

    others: Mapping[str, Mapping[str, Any]]
    levels: Sequence[Mapping[str, Any]]
    probe: Mapping[str, Any]
    recipe: Mapping[str, Any]


def is_study(folder: Path) -> bool:
    """Whether this is a folder of run folders rather than a run folder."""
    return not (folder / RECIPE).is_file() and bool(run_folders(folder))


def read_study_runs(folder: Path) -> StudyFiles:
    """Parse all run folders in `folder`.

    Raises:
        UserInputError: no finished run; runs with other test items or another base model than the first.
    """
    table = read_table(folder, _read_run, needed="selected, trained and evaluated")
    _check_one_model(table.runs)
    check_same_items(table.runs, {row["split"] for run in table.runs for row in run.rows})
    variants = name_variants(table.runs)
    named = (replace(run, variant=variants[run.name]) for run in table.runs)
    ordered = sorted(named, key=lambda r: (r.variant, r.n, r.level, r.draw, r.name))
    first = folder / table.runs[0].name
    return StudyFiles(
        name=table.name,
        runs=ordered,
        unfinished=table.unfinished,
        others=_others([folder / run.name for run in table.runs]),
        levels=_optional(first / "levels.jsonl", read_jsonl, []),
        probe=_optional(first / LEVELS_MANIFEST, read_object, {}),
        recipe=read_run_recipe(first),
    )


def _others(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Scores of the base model, and of it after solved examples, by the first run that has them."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("base", "fewshot"):
        files = [run / PREDICTIONS.format(name) for run in runs]
        if file := next((file for file in files if file.is_file()), None):
            found[name] = score(read_jsonl(file), where=str(file))
    return found


def _optional(path: Path, read: Any, default: Any) -> Any:
    return read(path) if path.is_file() else default


def _read_run(run: Path) -> LevelRun | str:
    missing = [name for name in (SELECTION, PREDICTIONS.format("tuned")) if not (run / name).is_file()]
    if missing:
        return f"no {', '.join(missing)}"
    recipe = read_run_recipe(run)
    selection = read_selection(run)
    path = run / PREDICTIONS.format("tuned")
    rows = read_jsonl(path)
    select = recipe.get("select") or {}
    wanted = select.get("levels") or {row["level"] for row in selection}
    settings = dict(flatten(recipe))
    if is_divided := select.get("balance") == "level":
        del settings["select.balance"]  # the level's name tells it
    found = _optional(run / LEVELS_MANIFEST, read_object, {}).get("model_fingerprint")
    return LevelRun(
        name=run.name,
        recipe=settings,
        n=len(selection),
        level=name_levels(wanted, is_divided=is_divided),
        model=str(found or settings.get("model.path")),
        rows=rows,
        scores=score(rows, where=str(path)),
        constant=_constant(selection, rows),
        metrics=_optional(run / DRIFT, read_object, {}),
    )


def _constant(
    selection: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    splits = dict.fromkeys(row["split"] for row in rows)
    found = {split: constant_rows(selection, [r for r in rows if r["split"] == split]) for split in splits}
    return {split: graded for split, graded in found.items() if graded is not None}


def name_levels(levels: Iterable[int], *, is_divided: bool = False) -> str:
    """The levels of a training set: a word for several, with which ones unless it is all.

    >>> [name_levels(levels) for levels in ([2], range(5), [1, 2, 3, 4], [3, 0, 1])]
    ['2', 'mixed', 'mixed 1-4', 'mixed 0,1,3']
    >>> [name_levels(levels, is_divided=True) for levels in ([2], range(5), [3, 4])]
    ['2', 'divided', 'divided 3,4']
    """
    found = sorted(set(levels))
    if len(found) == 1:
        return str(found[0])
    kind = DIVIDED if is_divided else MIXED
    if tuple(found) == tuple(LEVELS):
        return kind
    has_gap = found[-1] - found[0] >= len(found)
    which = ",".join(map(str, found)) if has_gap or len(found) == 2 else f"{found[0]}-{found[-1]}"
    return f"{kind} {which}"


def name_variants(runs: Sequence[LevelRun]) -> dict[str, str]:
    """Run -> what sets it apart besides size, level and draw: its adapter, then keys that differ."""
    axes = sorted(differing_keys([run.recipe for run in runs], NO_AXES))
    return {
        run.name: ", ".join(
            [
                *([run.adapter] if run.adapter != "none" else []),
                *(f"{key} {format_setting(run.recipe[key])}" for key in axes if key in run.recipe),
            ]
        )
        for run in runs
    }


def _check_one_model(runs: Sequence[LevelRun]) -> None:
    """Refuse runs of several base models: their memory levels are not the same."""
    models: dict[str, list[str]] = {}
    for run in runs:
        models.setdefault(run.model, []).append(run.name)
    if len(models) > 1:
        found = "; ".join(f"{model}: {', '.join(names[:3])}" for model, names in models.items())
        raise UserInputError(
            Problem(
                what="these runs are of different base models, whose memory levels can't be compared",
                where=LEVELS_MANIFEST,
                got=found,
                remedy="keep the runs of each model in a folder of their own",
            )
        )
