"""A study as a table: runs x flattened recipe x metrics, and what is counted over groups of its rows.

In: a folder of run folders. Out: rows of finished runs, why others have none; means over draws, differences
of two groups by item, every two groups of one size.
Invariant: a run counts once, with the items that all were evaluated on; a difference is paired by item and
has its 95 % interval; where many are looked at, `is_clear` asks for 1 - 0.05 / comparisons (Bonferroni).
Trade-off: predictions of all runs are held at once (300,000 rows for 252 runs of 1,200 items), so that items
can be paired across runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, Generic, TypeVar

from sftcore.amounts import counted
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.score import MAIN_SPLIT, Z, mean_interval
from sftcore.run_recipe import RECIPE
from sftcore.study.wording import format_setting

SHOWN_PROBLEMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A row: one finished run.

    Args:
        name: its folder's.
        recipe: dotted key -> value.
        n: training samples that were drawn.
        rows: of eval/tuned/predictions.jsonl.
        scores: `score` of them.
        metrics: name -> what else was measured.
    """

    name: str
    recipe: Mapping[str, Any]
    n: int = 0
    rows: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Any]
    metrics: Mapping[str, Any]


R = TypeVar("R", bound=Run)
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTable(Generic[R]):
    """All runs of a study.

    Args:
        name: its folder's.
        runs: finished ones.
        unfinished: name of each other one -> what is missing.
    """

    name: str
    runs: Sequence[R]
    unfinished: Mapping[str, str]


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a study's folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))


def read_table(folder: Path, read: Callable[[Path], R | str], *, needed: str) -> StudyTable[R]:
    """The table of all run folders in `folder`.

    Args:
        read: a run's row, or what it lacks.
        needed: what a run has to be to have a row, for the message.

    Raises:
        UserInputError: no run is finished.
    """
    found = {path.name: read(path) for path in run_folders(folder)}
    runs = [row for row in found.values() if not isinstance(row, str)]
    if not runs:
        remedy = f"let at least one run be {needed}"
        raise UserInputError(Problem(what="no finished run of a study", where=str(folder), remedy=remedy))
    unfinished = {name: row for name, row in found.items() if isinstance(row, str)}
    return StudyTable(name=folder.resolve().name, runs=runs, unfinished=unfinished)


def check_same_items(runs: Sequence[Run], splits: Collection[str]) -> None:
    """Refuse runs that were evaluated on other items of these splits than the first.

    Raises:
        UserInputError: naming the first few.
    """
    items = [{(row["split"], row["id"]) for row in run.rows if row["split"] in splits} for run in runs]
    problems = [
        Problem(
            what="these runs were evaluated on different items",
            where=f"{runs[0].name} and {run.name}",
            remedy="evaluate all runs of a study on the same data.test and data.ood",
        )
        for run, own in zip(runs, items, strict=True)
        if own != items[0]
    ]
    if problems:
        raise UserInputError(*problems[:SHOWN_PROBLEMS])


def differing_keys(
    recipes: Sequence[Mapping[str, Any]], but: Collection[str] = (), *, absent_differs: bool = False
) -> list[str]:
    """Keys (`but` some) in which recipes differ, in their order.

    Args:
        absent_differs: a key that some recipes lack is a difference by itself, though they may be of an
            earlier version.

    >>> differing_keys([{"train.lr": 1, "name": "a", "x": 1}, {"train.lr": 2, "name": "b"}], ["name"])
    ['train.lr']
    """
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in but)
    return [
        key
        for key in keys
        if len({format_setting(r.get(key)) for r in recipes if absent_differs or key in r}) > 1
    ]


def grouped(runs: Iterable[R], key: Callable[[R], K]) -> dict[K, list[R]]:
    """Runs by what `key` says of them, in their order."""
    groups: dict[K, list[R]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, lowest, highest and all values of the draws."""
    return {"mean": fmean(values), "low": min(values), "high": max(values), "draws": list(values)}


def right_shares(runs: Sequence[Run], split: str = MAIN_SPLIT) -> dict[Any, float]:
    """Item of a split -> share of the runs that got it right."""
    counts: dict[Any, int] = {}
    for run in runs:
        for row in run.rows:
            if row["split"] == split:
                counts[row["id"]] = counts.get(row["id"], 0) + row["correct"]
    return {item: count / len(runs) for item, count in counts.items()}


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Mean of paired differences with its normal 95 % interval: `difference`, `low`, `high`."""
    return dict(zip(("difference", "low", "high"), mean_interval(differences), strict=True))


def pairwise(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Every two groups in the order of their names, paired by test item.

    An item's difference is the share of the first group's draws that were right, minus the second's.

    Returns:
        `{first, second, difference, low, high, draws_overlap}`, shares; the interval is over the test items,
        which says nothing of the luck of the draws.
    """
    found = []
    for first, second in itertools.combinations(sorted(groups), 2):
        one, two = (right_shares(groups[name]) for name in (first, second))
        (low, high), (other_low, other_high) = (_range(groups[name]) for name in (first, second))
        found.append(
            {
                "first": first,
                "second": second,
                **interval([one[item] - two[item] for item in one]),
                "draws_overlap": low <= other_high and other_low <= high,
            }
        )
    return found


def _range(runs: Sequence[Run]) -> tuple[float, float]:
    accuracies = [run.scores["accuracy"] for run in runs]
    return min(accuracies), max(accuracies)


def is_clear(part: Mapping[str, float], *, comparisons: int) -> bool:
    """Whether a difference is above 0 as one of so many: 95 % becomes 1 - 0.05 / comparisons (Bonferroni).

    >>> [is_clear({"difference": 0.2, "low": 0.05}, comparisons=n) for n in (1, 10)]
    [True, False]
    """
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, comparisons)) / Z
    return part["difference"] - wider * (part["difference"] - part["low"]) > 0


def head_lines(report: Mapping[str, Any]) -> list[str]:
    """What a study's plain text begins with: its name, model and size, the verdict, an empty line."""
    named = f"{report['name']} ({report['model']}), {counted(report['num_runs'], 'run')}"
    return [named, *report["verdict"], ""]
