"""Relations: their names, their question, and the completion prefixes that probe a fact.

In: assets/relations.json, a user's own file in the same format. Out: `Relation`s by id.
Invariant: this is the one reader of such files: every question and prefix holds {subject} once, whoever asks;
a prefix ends right before the object, without a space, so what a model writes next begins with the answer.
Trade-off: all keys are asked of every entry, those too that a run does not use (a minute of writing), so that
a file that trains can be probed, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sftcore.data.rows import has_surrogates
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_json
from sftcore.recipe import ASSETS

RELATIONS_PATH = ASSETS / "relations.json"
SUBJECT = "{subject}"
KEYS = ("name", "domain", "question", "completions")
DOMAINS = ("in", "out")  # trained and tested | tested only


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
        raise UserInputError(Problem(what="not a table of relations", where=str(path), allowed=FORMAT))
    problems = [
        Problem(what=fault, where=f"{path}: {relation_id}", allowed=FORMAT)
        for relation_id, entry in raw.items()
        for fault in _entry_faults(entry)
    ]
    if problems:
        raise UserInputError(*problems)
    return {
        i: Relation(id=i, **{**entry, "completions": tuple(entry["completions"])}) for i, entry in raw.items()
    }


FORMAT = (
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
        elif has_surrogates(text):
            yield f"each text is text: no half characters; got {text!r}"
    for prefix in map(str, prefixes):
        if prefix != prefix.strip():
            yield f"a prefix has no spaces around it (the model writes the next one); got {prefix!r}"
