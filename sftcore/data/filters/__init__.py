"""Filters: why a record should go, decided from columns; one function each, one table in order.

In: `Columns` of all records, the reasons that a recipe asks for. Out: which rows each of them holds for.
Invariant: of several reasons to drop a record the first of the table counts; in memory and in a store the
same records go.
Trade-off: a filter sees columns, never texts, so it can look at 10 million rows; what it needs of a text has
to be a column (`columns.py`, and `parts.ROWS_SCHEMA` for stores).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from sftcore.data.filters.columns import Columns, Hashes, Mask, Render, columns_of, hash_asked
from sftcore.data.filters.contradiction import contradictions
from sftcore.data.filters.duplicate import duplicates
from sftcore.data.filters.leak import leaks
from sftcore.data.filters.trivial import answers_in_subject, short_answers
from sftcore.data.ledger import HYGIENE, Reason
from sftcore.data.records import Record

__all__ = [
    "FILTERS",
    "Columns",
    "Hashes",
    "columns_of",
    "filter_columns",
    "first_reasons",
    "hash_asked",
    "judge",
]
Filter = Callable[[Columns], Mask]
FILTERS: dict[Reason, Filter] = {
    Reason.LEAK: leaks,
    Reason.CONTRADICTORY_LABEL: contradictions,
    Reason.DUPLICATE: duplicates,
    Reason.SHORT_ANSWER: short_answers,
    Reason.ANSWER_IN_SUBJECT: answers_in_subject,
}
COMPARED = tuple(reason for reason in FILTERS if reason in HYGIENE)  # of training records


def filter_columns(columns: Columns, reasons: Collection[Reason]) -> dict[Reason, Mask]:
    """Which rows each of the reasons holds for, in the order of the table; a row may have several."""
    return {reason: marks(columns) for reason, marks in FILTERS.items() if reason in reasons}


def first_reasons(masks: dict[Reason, Mask], num_rows: int) -> list[Reason | None]:
    """The reason that counts for each row.

    >>> first_reasons({Reason.LEAK: np.array([False, True]), Reason.DUPLICATE: np.array([True, True])}, 2)
    [<Reason.DUPLICATE: 'duplicate'>, <Reason.LEAK: 'leak'>]
    """
    verdicts: list[Reason | None] = [None] * num_rows
    for reason, mask in reversed(masks.items()):
        for row in np.flatnonzero(mask).tolist():
            verdicts[row] = reason
    return verdicts


def judge(
    train: Sequence[Record], held_out: Iterable[Record], render: Render | None = None
) -> list[Reason | None]:
    """Why each training record goes when it is compared with the others and with what is held out."""
    columns = columns_of(train, hash_asked(held_out, render))
    return first_reasons(filter_columns(columns, COMPARED), len(train))
