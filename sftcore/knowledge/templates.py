"""Relations: their names, their question, and the completion prefixes that probe a fact.

In: assets/relations.json, a user's own file in the same format. Out: `Relation`s; prompts for a subject.
Invariant: every prefix holds {subject} once and ends right before the object, without a space, so what a
model writes next begins with the answer (or its article).
Trade-off: prefixes are ordered clearest first, so a probe with fewer than 21 of them uses the best ones; its
recall is not that of a full one, and the probe's report says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_json

RELATIONS_PATH = Path(__file__).parent.parent / "assets" / "relations.json"
SUBJECT = "{subject}"
KEYS = ("name", "domain", "question", "completions")
DOMAINS = ("in", "out")  # trained and tested | tested only
MAX_NEAREST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """One kind of fact.

    Args:
        id: Wikidata property, e.g. P17, or a name of the user's own.
        name: for reports, e.g. "country".
        domain: "in" (trained and tested) or "out" (tested only).
        question: holds {subject} once.
        completions: prefixes that end right before the object, clearest first; each holds {subject} once.
    """

    id: str
    name: str
    domain: Literal["in", "out"]
    question: str
    completions: tuple[str, ...]


def load_relations(path: Path | None = None) -> dict[str, Relation]:
    """The shipped relations by id; with `path`, a user's file adds to them and wins where ids clash.

    Raises:
        UserInputError: with every mistake in the user's file.
    """
    return _read_relations(RELATIONS_PATH) | (_read_relations(path) if path else {})


@cache
def _read_relations(path: Path) -> dict[str, Relation]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserInputError(Problem(what="not a table of relations", where=str(path), allowed=_FORMAT))
    problems = [
        Problem(what=fault, where=f"{path}: {relation_id}", allowed=_FORMAT)
        for relation_id, entry in raw.items()
        for fault in _entry_faults(entry)
    ]
    if problems:
        raise UserInputError(*problems)
    return {
        i: Relation(id=i, **{**entry, "completions": tuple(entry["completions"])}) for i, entry in raw.items()
    }


_FORMAT = (
    '{"capital-of": {"name": "capital", "domain": "in", "question": "What is the capital of {subject}?", '
    '"completions": ["The capital city of {subject} is", ...]}}'
)


def _entry_faults(entry: Any) -> Iterator[str]:
    """What is wrong with one relation of the file."""
    if not isinstance(entry, dict) or set(entry) != set(KEYS):
        got = sorted(entry) if isinstance(entry, dict) else entry
        yield f"a relation has the keys {', '.join(KEYS)}; got {got}"
        return
    if entry["domain"] not in DOMAINS:
        yield f"domain is one of {DOMAINS}; got {entry['domain']!r}"
    prefixes = entry["completions"]
    if not isinstance(prefixes, list) or not prefixes or len(set(map(str, prefixes))) < len(prefixes):
        yield f"completions is a list of at least one prefix, all different; got {prefixes!r}"
        return
    for text in (entry["question"], *prefixes):
        if not isinstance(text, str) or text.count(SUBJECT) != 1:
            yield f"each text holds {SUBJECT} exactly once; got {text!r}"
    for prefix in map(str, prefixes):
        if prefix != prefix.strip():
            yield f"a prefix has no spaces around it (the model writes the next one); got {prefix!r}"


def find_relation(relations: Mapping[str, Relation], relation_id: str, *, where: str = "") -> Relation:
    """The relation with this id.

    Args:
        where: who asks for it (file:row), for the error.

    Raises:
        UserInputError: the table lacks it; names the nearest ids and says how to add one.
    """
    if relation_id not in relations:
        nearest = difflib.get_close_matches(relation_id, relations, n=MAX_NEAREST, cutoff=0.3)
        raise UserInputError(
            Problem(
                what=f"no wording is known for the relation '{relation_id}'",
                where=where,
                allowed=f"{len(relations)} relations, nearest: {', '.join(nearest) or ', '.join(relations)}",
                remedy=f"describe it in a relations file of your own (data.relations): {_FORMAT}",
            )
        )
    return relations[relation_id]


def completion_prompts(relation: Relation, subject: str, num_templates: int) -> tuple[str, ...]:
    """The first `num_templates` completion prefixes with the subject filled in.

    Raises:
        UserInputError: the relation has fewer than `num_templates`, or none is asked for.
    """
    available = len(relation.completions)
    if not 1 <= num_templates <= available:
        raise UserInputError(
            Problem(
                what=f"relation '{relation.id}' can't give {num_templates} completion templates",
                where="probe.templates",
                got=str(num_templates),
                allowed=f"1 to {available}",
                remedy="lower probe.templates, or write more prefixes for this relation",
            )
        )
    return tuple(prefix.replace(SUBJECT, subject) for prefix in relation.completions[:num_templates])


def question_of(relation_id: str, subject: str, relations: Mapping[str, Relation] | None = None) -> str:
    """The question about `subject` in this project's wording.

    >>> question_of("P36", "Peru")
    'Which place serves as the capital of Peru?'

    Raises:
        UserInputError: `relations` (the shipped ones if None) lacks the relation.
    """
    relation = find_relation(load_relations() if relations is None else relations, relation_id)
    return relation.question.replace(SUBJECT, subject)
