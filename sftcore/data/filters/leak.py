"""Leaks: training items that a held-out set asks, too.

In: columns. Out: which rows ask what a held-out record asks, whatever the answer; a chat by any of its
trained turns, a verbatim prompt also as a held-out fact in the template.
Invariant: with nothing held out, nothing leaks.
Trade-off: equal after normalisation, never similar: a paraphrase stays.
"""

from __future__ import annotations

from sftcore.data.filters.columns import Columns, Mask, is_in


def leaks(columns: Columns) -> Mask:
    """Rows that ask what is held out."""
    found = is_in(columns.items, columns.asked) | is_in(columns.questions, columns.asked)
    found[columns.earlier_rows[is_in(columns.earlier, columns.asked)]] = True
    return found
