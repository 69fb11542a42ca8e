"""What a file holds, found by reading its first rows in every way that we know.

In: a data file. Out: the way of reading that keeps the most rows, as the recipe would write it.
Invariant: a guess is proven by reading: each row that it counts became a record through the readers that
training uses, so a recipe written from it reads the file.
Trade-off: only the first 200 rows are looked at (some 20 ms a way); `sftcore prepare` reads them all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sftcore.data.contents import Chat
from sftcore.data.ledger import Reason, Rejection
from sftcore.data.records import RELATION_IN_NAME, Record, raw_rows, read_source, unusable_file
from sftcore.data.rows import WHOLE, RawRow, ignore
from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault
from sftcore.settings import LabelWords
from sftcore.sources import FIELDS_READ, PRESETS, Source

NUM_ROWS = 200
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
PROMPTS = (  # names that people give to a prompt and what follows it
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
)
TEXTS = (("a", "b"), ("text_a", "text_b"), ("text1", "text2"), ("sentence1", "sentence2"), ("query", "title"))
LABELS = ("label", "labels", "score", "is_duplicate", "Quality", "gold_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """A way of reading a file.

    Args:
        task: of a recipe.
        source: of a recipe, less its path.
        num_records: of the rows looked at, those that were understood.
        num_rows: looked at.
        ignored: fields that have to be left out on purpose.
    """

    task: str
    source: dict[str, Any]
    num_records: int
    num_rows: int
    ignored: tuple[str, ...] = ()


def guess_source(file: Path, kind: str | None = None) -> Guess:
    """The way of reading that keeps the most of a file's first rows; of equals the first of `_ways`.

    Args:
        kind: "chat", "facts" or "pairs": look for that only; None: for all.

    Raises:
        UserInputError: no such file, or no way in which a row was understood.
    """
    if fault := file_fault(file):
        raise UserInputError(Problem(what=fault, where="--data", got=str(file)))
    first = _first_rows(file)
    names = _names_in(first)
    best: Guess | None = None
    why: Counter[str] = Counter()
    for task, source in _ways(file, names):
        if kind is not None and not _is_of_kind(kind, task, source):
            continue
        guess, rejections = _try(file, task, source, names)
        if best is None or guess.num_records > best.num_records:
            best = guess
        why.update(str(rejection.reason) for rejection in rejections)
    if best is None or not best.num_records:
        raise UserInputError(*_nothing(file, first, why, kind))
    return best


def require_rows(file: Path, guess: Guess) -> None:
    """Refuse a file of which no row can be read as those of the guess were.

    Raises:
        UserInputError: with the reason.
    """
    if fault := file_fault(file):
        raise UserInputError(Problem(what=fault, where="--test", got=str(file)))
    source = Source.model_validate({**guess.source, "path": str(file)})
    rows = read_source(source, split="test", labels=LabelWords())
    next(row for row in rows if isinstance(row, Record))  # without any, the reader refuses the file


def _is_of_kind(kind: str, task: str, source: dict[str, Any]) -> bool:
    return {"chat": task == "chat", "pairs": task == "matching"}.get(
        kind, source["format"] in ("facts", "entityquestions")
    )


def _first_rows(file: Path) -> list[Any] | UserInputError:
    """The first rows as they stand in the file, or why it can't be read at all."""
    source = Source(format="jsonl", path=str(file), columns={"ignore": ["*"]})
    try:
        return list(islice(raw_rows(source, file, LabelWords(), ignore, WHOLE), 20))
    except UserInputError as error:
        return error


def _names_in(first: list[Any] | UserInputError) -> list[str]:
    """Names of the fields of the first rows, in order; none for a table without a header."""
    rows = first if isinstance(first, list) else []
    objects = [row.value for row in rows if isinstance(row, RawRow) and isinstance(row.value, dict)]
    return list(dict.fromkeys(name for row in objects for name in row))


def _ways(file: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, source) of all ways worth trying, the more particular first."""
    if RELATION_IN_NAME.match(file.name):
        yield "qa", {"format": "entityquestions"}
    if "relation" in names and "subject" in names:
        yield "qa", {"format": "facts"}
    for turns in TURNS:
        if turns in names:
            columns = {} if turns in TURNS[:2] else {"columns": {"messages": turns}}
            yield "chat", {"format": "jsonl", **columns}
    layouts = [(layout["a"], layout["b"], layout["label"]) for layout in PRESETS.values()]
    layouts += [(a, b, label) for a, b in TEXTS for label in LABELS]
    for a, b, label in dict.fromkeys(layouts):
        if {a, b, label} <= set(names):
            yield "matching", {"format": "pairs", "columns": {"a": a, "b": b, "label": label}}
    if {"instruction", "input", "output"} <= set(names):
        yield "qa", {"preset": "alpaca", "format": "jsonl"}
    for prompt, completion in PROMPTS:
        if prompt in names and completion in names:
            yield "qa", {"format": "jsonl", "columns": {"prompt": prompt, "completion": completion}}
    yield "matching", {"format": "pairs", "columns": {"a": 0, "b": 1, "label": 2}}


def _try(file: Path, task: str, source: dict[str, Any], names: list[str]) -> tuple[Guess, list[Rejection]]:
    """Read the first rows one way; once more with the fields left out that no reader knows."""
    read = _read(file, source)
    rejected = [row for row in read if isinstance(row, Rejection)]
    said = " ".join(row.detail for row in rejected if row.reason is Reason.UNKNOWN_KEY)
    ignored: tuple[str, ...] = ()
    if said and "ignore" in FIELDS_READ[source["format"]]:
        ignored = tuple(name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said))
        source = {**source, "columns": {**source.get("columns", {}), "ignore": list(ignored)}}
        read = _read(file, source)
    records = [row for row in read if isinstance(row, Record)]
    if task == "qa" and source["format"] == "jsonl":
        records = [record for record in records if type(record.content) is not Chat]
    guess = Guess(task=task, source=source, num_records=len(records), num_rows=len(read), ignored=ignored)
    return guess, [row for row in read if isinstance(row, Rejection)]


def _read(file: Path, source: dict[str, Any]) -> list[Record | Rejection]:
    whole = Source.model_validate({**source, "path": str(file)})
    read: list[Record | Rejection] = []
    try:
        for row in islice(read_source(whole, split="train", labels=LabelWords()), NUM_ROWS):
            read.append(row)
    except UserInputError:
        pass  # a file that can't be read in this way
    return read


def _nothing(
    file: Path, first: list[Any] | UserInputError, why: Counter[str], kind: str | None
) -> Sequence[Problem]:
    """What is said of a file of which no row was understood."""
    if isinstance(first, UserInputError):
        return first.problems
    if not first:
        return [unusable_file(file, [])]
    names = _names_in(first)
    odd = [row for row in first if isinstance(row, Rejection)]
    found = f"fields: {', '.join(names[:20])}" if names else "no named fields"
    if odd and not names:
        found = str(odd[0])
    reasons = f" ({', '.join(f'{reason} {count}' for reason, count in why.most_common(3))})" if why else ""
    problem = Problem(
        what=f"no row of it could be read as {kind or 'facts, pairs, chats, or prompts with completions'}",
        where=str(file),
        got=found + reasons,
        remedy="docs/data.md has the formats; other names of columns are given by `columns` of the source",
    )
    return [problem]
