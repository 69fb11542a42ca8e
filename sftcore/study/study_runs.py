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
class StudyRun:
    """One finished run.

    Args:
        name: its folder's.
        n: training facts.
        level: memory level that they are from, "0".."4", or several, as `name_levels` has it.
        draw: number of the draw.
        adapter: "none" or the adapter's kind.
        settings: dotted key -> value of the recipe, where that may set runs of the same size and level apart.
        variant: `adapter` and those `settings` in which the study's runs differ, in words; "" if nothing.
        model: fingerprint of the base model, or its path where the levels don't tell.
        rows: of eval/tuned/predictions.jsonl.
        scores: `score` of them.
        constant: of its splits, what always giving a relation's most frequent selected answer gets: rows.
        drift: mean KL of first tokens in nats, if measured.
        drift_level: of the facts that it was measured on.
    """

    name: str
    n: int
    level: str
    draw: int
    adapter: str
    settings: Mapping[str, Any]
    variant: str = ""
    model: str
    rows: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    constant: Mapping[str, Sequence[Mapping[str, Any]]]
    drift: float | None
    drift_level: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFiles:
    """A study.

    Args:
        runs: finished ones, in a fixed order.
        unfinished: name -> what is missing.
        others: "base" and "fewshot" -> scores, where a run has them.
        levels: rows of levels.jsonl, which the runs share.
        probe: content of levels.manifest.json.
        recipe: of the first run.
    """

    name: str
    runs: Sequence[StudyRun]
    unfinished: Mapping[str, str]
    others: Mapping[str, Mapping[str, Any]]
    levels: Sequence[Mapping[str, Any]]
    probe: Mapping[str, Any]
    recipe: Mapping[str, Any]


def is_study(folder: Path) -> bool:
    """Whether this is a folder of run folders rather than a run folder."""
    return not (folder / RECIPE).is_file() and any(folder.glob(f"*/{RECIPE}"))


def read_study_runs(folder: Path) -> StudyFiles:
    """Parse all run folders in `folder`.

    Raises:
        UserInputError: no finished run; runs with other test items or another base model than the first.
    """
    runs, unfinished, others = [], {}, {}
    for run in sorted(path.parent for path in folder.glob(f"*/{RECIPE}")):
        missing = [name for name in (SELECTION, PREDICTIONS.format("tuned")) if not (run / name).is_file()]
        if missing:
            unfinished[run.name] = f"no {', '.join(missing)}"
            continue
        runs.append((run, _read_run(run)))
        for name in ("base", "fewshot"):
            path = run / PREDICTIONS.format(name)
            if path.is_file() and name not in others:
                others[name] = score(read_jsonl(path), where=str(path))
    if not runs:
        remedy = "let at least one run be selected, trained and evaluated"
        raise UserInputError(Problem(what="no finished run of a study", where=str(folder), remedy=remedy))
    _check_comparable(runs)
    first = runs[0][0]
    variants = name_variants([run for _, run in runs])
    named = (replace(run, variant=variants[run.name]) for _, run in runs)
    ordered = sorted(named, key=lambda r: (r.variant, r.n, r.level, r.draw, r.name))
    return StudyFiles(
        name=folder.resolve().name,
        runs=ordered,
        unfinished=unfinished,
        others=others,
        levels=_optional(first / "levels.jsonl", read_jsonl, []),
        probe=_optional(first / LEVELS_MANIFEST, read_object, {}),
        recipe=read_run_recipe(first),
    )


def _optional(path: Path, read: Any, default: Any) -> Any:
    return read(path) if path.is_file() else default


def _read_run(run: Path) -> StudyRun:
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
    drift = _optional(run / DRIFT, read_object, {})
    return StudyRun(
        name=run.name,
        n=len(selection),
        level=name_levels(wanted, is_divided=is_divided),
        draw=select.get("draw", 0),
        adapter=settings.get(KIND, "none"),
        settings={key: value for key, value in settings.items() if key not in NO_AXES},
        model=str(found or settings.get("model.path")),
        rows=rows,
        scores=score(rows, where=str(path)),
        constant=_constant(selection, rows),
        drift=drift.get("mean_kl_nats"),
        drift_level=drift.get("level"),
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


def name_variants(runs: Sequence[StudyRun]) -> dict[str, str]:
    """Run -> what sets it apart besides size, level and draw: its adapter, then keys in which recipes differ.

    A key that some recipes lack (they are of an earlier version) is no difference by itself.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(format_setting(value))
    axes = sorted(key for key, found in values.items() if len(found) > 1)
    return {
        run.name: ", ".join(
            [
                *([run.adapter] if run.adapter != "none" else []),
                *(f"{key} {format_setting(run.settings[key])}" for key in axes if key in run.settings),
            ]
        )
        for run in runs
    }


def _check_comparable(runs: Sequence[tuple[Path, StudyRun]]) -> None:
    _check_one_model([run for _, run in runs])
    first, reference = runs[0][0], {(row["split"], row["id"]) for row in runs[0][1].rows}
    problems = [
        Problem(
            what="these runs were evaluated on different items",
            where=f"{first.name} and {path.name}",
            remedy="evaluate all runs of a study on the same data.test and data.ood",
        )
        for path, run in runs[1:]
        if {(row["split"], row["id"]) for row in run.rows} != reference
    ]
    if problems:
        raise UserInputError(*problems[:3])


def _check_one_model(runs: Sequence[StudyRun]) -> None:
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
