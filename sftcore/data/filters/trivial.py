"""Trivial facts: a hit on them would say nothing of what a model remembers.

In: columns with `trivial` filled. Out: which rows are facts with a one-letter answer; with an answer in the
subject.
Invariant: what is not a fact is never trivial.
Trade-off: any answer counts, so one short alias costs the fact (`data.trivial_facts: keep` keeps it).
"""

from __future__ import annotations

from sftcore.data.filters.columns import REASONS, Columns, Mask
from sftcore.data.ledger import Reason


def short_answers(columns: Columns) -> Mask:
    """Facts with an answer of one letter."""
    return columns.trivial == REASONS.index(Reason.SHORT_ANSWER)


def answers_in_subject(columns: Columns) -> Mask:
    """Facts whose subject holds an answer."""
    return columns.trivial == REASONS.index(Reason.ANSWER_IN_SUBJECT)
