"""Relations: their names, their question, and the completion prefixes that probe a fact.

In: assets/relations.json, a user's own file in the same format. Out: `Relation`s by id.
Invariant: this is the one reader of such files: every question and prefix holds {subject} once, whoever asks;
a prefix ends right before the object, without a space, so what a model writes next begins with the answer.
Trade-off: all keys are asked of every entry, those too that a run does not use (a minute of writing), so that
a file that trains can be probed, and the other way round.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sftcore.data.rows import has_surrogates
from sftcore.display import shown
from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault
from sftcore.recipe import ASSETS

RELATIONS_PATH = ASSETS / "relations.json"
SUBJECT = "{subject}"
MAX_SHOWN = 100  # letters of a name in a message
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
    raw = _parsed(path)
    if not isinstance(raw, dict) or not raw:
        raise UserInputError(Problem(what="not a table of relations", where=str(path), allowed=FORMAT))
    problems = [
        Problem(what=fault, where=f"{path}: {shown(relation_id, MAX_SHOWN)}", allowed=FORMAT)
        for relation_id, entry in raw.items()
        for fault in (*_id_faults(relation_id), *_entry_faults(entry))
    ]
    if problems:
        raise UserInputError(*problems)
    return {
        i: Relation(id=i, **{**entry, "completions": tuple(entry["completions"])}) for i, entry in raw.items()
    }


def _parsed(path: Path) -> Any:
    """The file's JSON value, with or without a byte-order mark.

    Raises:
        UserInputError: unreadable, no JSON, or a key twice in one object.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    if fault := file_fault(path):
        raise UserInputError(Problem(what=f"can't be read: {fault}", where=str(path), allowed=FORMAT))
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserInputError(Problem(what=f"not valid JSON: {error}", where=str(path))) from error
    if twice:
        what = f"the same name twice: {', '.join(shown(name, MAX_SHOWN) for name in twice)}"
        raise UserInputError(Problem(what=what, where=str(path), remedy="keep one of them"))
    return value


FORMAT = (
    '{"capital-of": {"name": "capital", "domain": "in", "question": "What is the capital of {subject}?", '
    '"completions": ["The capital city of {subject} is", ...]}}'
)


def _id_faults(relation_id: str) -> Iterator[str]:
    if not relation_id or relation_id != relation_id.strip() or _text_fault(relation_id):
        yield f"a relation's id is text without spaces around it; got {relation_id!r}"


def _text_fault(text: Any) -> str:
    """Why a value is no text that can be shown and tokenized; "" if it is."""
    if not isinstance(text, str) or not text.strip():
        return "is not text, or empty"
    if has_surrogates(text):
        return "has half characters"
    return "has a NUL" if "\0" in text else ""


def _entry_faults(entry: Any) -> Iterator[str]:
    """What is wrong with one relation of the file."""
    if not isinstance(entry, dict) or set(entry) != set(KEYS):
        got = sorted(entry) if isinstance(entry, dict) else entry
        yield f"a relation has the keys {', '.join(KEYS)}; got {got}"
        return
    if fault := _text_fault(entry["name"]):
        yield f"name {fault}; got {entry['name']!r}"
    if entry["domain"] not in DOMAINS:
        yield f"domain is one of {DOMAINS}; got {entry['domain']!r}"
    prefixes = entry["completions"]
    if not isinstance(prefixes, list) or not prefixes or len(set(map(str, prefixes))) < len(prefixes):
        yield f"completions is a list of at least one prefix, all different; got {prefixes!r}"
        return
    for kind, text in (("question", entry["question"]), *(("prefix", prefix) for prefix in prefixes)):
        if not isinstance(text, str) or text.count(SUBJECT) != 1:
            yield f"each text holds {SUBJECT} exactly once; got {text!r}"
        elif "{" in (rest := text.replace(SUBJECT, "")) or "}" in rest:
            yield f"a text holds no brace but those of {SUBJECT}; got {text!r}"
        elif fault := _text_fault(text):
            yield f"a {kind} {fault}; got {text!r}"
        elif text != text.strip():
            yield f"a {kind} has no spaces around it (a model writes the one after it); got {text!r}"
