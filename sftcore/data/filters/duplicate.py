"""Duplicates: exact copies of prompt and trained answer.

In: columns. Out: which rows are copies of an earlier one.
Invariant: of exact duplicates the first stays.
Trade-off: unlike leaks, copies are compared letter by letter: another spelling is another sample.
"""

from __future__ import annotations

from sftcore.data.filters.columns import Columns, Mask, repeated


def duplicates(columns: Columns) -> Mask:
    """Each copy after the first."""
    return repeated(columns.texts)
