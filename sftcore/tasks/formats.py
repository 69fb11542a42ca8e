"""Formats: how a row of a source becomes content.

In: a source's `columns`, label words. Out: a function from a row's fields to `Content`, or `OddRow`.
Invariant: what a row says and no reader takes is refused, or known to say nothing about training.
Trade-off: a reader is made once a file, so that label words and names are looked up once, not once a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from sftcore.settings import LabelWords
from sftcore.sources import Columns
from sftcore.tasks.kinds.content import Content

if TYPE_CHECKING:  # the kinds of contents are made by these, and are read here
    from sftcore.data.contents import Fields

FACT_NAMES = frozenset(["relation", "subject", "answers", "question"])
Parse = Callable[["Fields"], Content]
Reader = Callable[[Columns, LabelWords], Parse]


def questions(columns: Columns, labels: LabelWords) -> Parse:
    """EntityQuestions: a question with its answers."""
    from sftcore.data.contents import parse_question

    return _without_others(parse_question, "fact", columns)


def facts(columns: Columns, labels: LabelWords) -> Parse:
    """Relation, subject, answers, perhaps a question."""
    from sftcore.data.contents import parse_fact

    return _without_others(parse_fact, "fact", columns)


def pairs(columns: Columns, labels: LabelWords) -> Parse:
    """Two texts, a label, perhaps a rationale."""
    from sftcore.data.contents import label_numbers, parse_pair

    numbers = label_numbers(labels)
    return _without_others(lambda fields: parse_pair(fields, numbers), "pair", columns)


def examples(columns: Columns, labels: LabelWords) -> Parse:
    """Prompts with completions, and chats, verbatim."""
    from sftcore.data.examples import parse_example

    return lambda fields: parse_example(fields, columns)


READERS: dict[str, Reader] = {
    "entityquestions": questions,
    "facts": facts,
    "pairs": pairs,
    "jsonl": examples,
}


def _without_others(
    parse: Callable[[Fields], Content], place: Literal["fact", "pair"], columns: Columns
) -> Callable[[Fields], Content]:
    """`parse` that refuses a row of which something is not read, unless that says nothing about training."""
    from sftcore.data.metadata import leave_out
    from sftcore.data.tables import OTHERS

    ids = frozenset(filter(None, [columns.id]))
    known = ids | FACT_NAMES if place == "fact" else ids

    def checked(fields: Fields) -> Content:
        content = parse(fields)
        others = fields.row.value if place == "fact" else fields.row.value.get(OTHERS, {})
        leave_out(fields, others, known, place=place, ignored=columns.ignore)
        return content

    return checked
