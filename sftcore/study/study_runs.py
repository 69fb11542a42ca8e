"""The folder of a QA study, parsed: its run folders, and the base model's scores that they share.

In: a folder whose subfolders are run folders (`sftcore study` makes such). Out: `StudyFiles`.
Invariant: a run counts only if its predictions, its selection and its recipe are there and agree with each
other; the others are named, never guessed at.
Trade-off: predictions of all runs are held at once (300,000 rows for 252 runs of 1,200 items), so that items
can be paired across runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.score import score
from sftcore.fsio import read_json, read_jsonl
from sftcore.study.run_folder import PREDICTIONS, RECIPE

SELECTION = "selection.jsonl"
MIXED, DIVIDED = "mixed", "divided"  # of several levels, as many as come, or equal shares
DRIFT = "eval/drift.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """One finished run.

    Args:
        name: its folder's.
        n: training facts.
        level: memory level that they are from, "0".."4", "mixed" or "divided".
        draw: number of the draw.
        adapter: "none" or the adapter's kind.
        rows: of eval/tuned/predictions.jsonl.
        scores: `score` of them.
        drift: mean KL of first tokens in nats, if measured.
    """

    name: str
    n: int
    level: str
    draw: int
    adapter: str
    rows: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    drift: float | None


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
    ordered = sorted((run for _, run in runs), key=lambda r: (r.adapter, r.n, r.level, r.draw, r.name))
    return StudyFiles(
        name=folder.resolve().name,
        runs=ordered,
        unfinished=unfinished,
        others=others,
        levels=_optional(first / "levels.jsonl", read_jsonl, []),
        probe=_optional(first / "levels.manifest.json", read_json, {}),
        recipe=yaml.safe_load((first / RECIPE).read_text(encoding="utf-8")),
    )


def _optional(path: Path, read: Any, default: Any) -> Any:
    return read(path) if path.is_file() else default


def _read_run(run: Path) -> StudyRun:
    recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    selection = read_jsonl(run / SELECTION)
    path = run / PREDICTIONS.format("tuned")
    rows = read_jsonl(path)
    select = recipe.get("select") or {}
    wanted = select.get("levels") or sorted({row["level"] for row in selection})
    several = DIVIDED if select.get("balance") == "level" else MIXED
    return StudyRun(
        name=run.name,
        n=len(selection),
        level=str(wanted[0]) if len(wanted) == 1 else several,
        draw=select.get("draw", 0),
        adapter=(recipe.get("adapter") or {}).get("kind", "none"),
        rows=rows,
        scores=score(rows, where=str(path)),
        drift=_optional(run / DRIFT, read_json, {}).get("mean_kl_nats"),
    )


def _check_comparable(runs: Sequence[tuple[Path, StudyRun]]) -> None:
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
