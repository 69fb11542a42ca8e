"""Random draws of pairs, the classes in equal numbers.

In: pair records, a size, a seed, the draw's number. Out: the drawn records, in the order of the data.
Invariant: a pure function of (ids, labels, n, seed, draw); of one draw the smaller sizes are subsets of the
larger ones, so a curve over sizes adds data and never swaps it.
Trade-off: nested draws make the points of a curve depend on each other; several draws show the spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sftcore.config import SelectSettings
from sftcore.data.records import Record
from sftcore.errors import Problem, UserInputError

LABELS = (0, 1)


def draw_pairs(
    records: Sequence[Record],
    n: int | Literal["all"],
    *,
    balance: Literal["label", "none"],
    seed: int,
    draw: int,
) -> list[Record]:
    """`n` of the pairs; with balance "label" half of each class (an odd one is of class 0).

    "all" of them are, with balance "label", the smaller class and as many of the larger.

    Raises:
        UserInputError: too few pairs, in all or of a class.
    """
    groups = [_of_label(records, label) for label in LABELS] if balance == "label" else [list(records)]
    if n == "all":
        n = len(groups) * min(map(len, groups))
    sizes = [(n + 1) // 2, n // 2] if balance == "label" else [n]
    if not n or any(len(group) < size for group, size in zip(groups, sizes, strict=True)):
        raise UserInputError(_too_few(n, balance, [len(group) for group in groups]))
    drawn: set[str] = set()
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        order = np.random.default_rng([seed, draw, number]).permutation(len(group))
        drawn |= {group[int(i)].id for i in order[:size]}
    return [record for record in records if record.id in drawn]


def draw_selected(records: Sequence[Record], select: SelectSettings | None, *, seed: int) -> list[Record]:
    """The pairs that a recipe trains on: all of them without `select`.

    Raises:
        UserInputError: as `draw_pairs`.
    """
    if select is None:
        return list(records)
    assert select.balance in ("label", "none")
    return draw_pairs(records, select.n, balance=select.balance, seed=seed, draw=select.draw)


def _of_label(records: Sequence[Record], label: int) -> list[Record]:
    return [record for record in records if record.content.gold == label]


def _too_few(n: int, balance: str, available: Sequence[int]) -> Problem:
    most = 2 * min(available) if balance == "label" else available[0]
    counts = ", ".join(f"label {label}: {count}" for label, count in zip(LABELS, available, strict=False))
    what = f"{n} pairs can't be drawn"
    remedy = "lower select.n, or leave `select` out to train on all"
    if empty := [label for label, count in zip(LABELS, available, strict=False) if not count]:
        what = f"no pair of label {empty[0]} to draw" if balance == "label" else "no pair to draw"
        remedy = "train on pairs of both labels; select.balance: none draws from those there are"
    return Problem(
        what=what,
        where="select.n",
        got=counts if balance == "label" else f"{available[0]} pairs",
        allowed=f"at most {most}" if most else "",
        remedy=remedy,
    )
