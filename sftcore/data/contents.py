"""What one row says: a fact, a pair, a completion or a chat.

In: a `RawRow` of known format. Out: the frozen noun that later stages work on, or `OddRow` with the reason.
Invariant: each text in a noun is non-empty where it has to be, valid Unicode and free of NUL.
Trade-off: whole numbers are taken as text (a year as answer, counted in the ledger), but 1.5, true and null
are refused: Python's spelling of them need not be the one that the file's author meant.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sftcore.data.ledger import Alteration, Change, Reason
from sftcore.data.rows import Note, RawRow, has_surrogates, likely_encoding
from sftcore.settings import BARE_LABELS, LabelWords
from sftcore.tasks.kinds.chat import Chat as Chat
from sftcore.tasks.kinds.completion import Completion as Completion
from sftcore.tasks.kinds.content import UNKNOWN_LABEL
from sftcore.tasks.kinds.content import Content as Content
from sftcore.tasks.kinds.content import Message as Message
from sftcore.tasks.kinds.fact import Fact as Fact
from sftcore.tasks.kinds.pair import Pair as Pair

OTHER_LABELS = {"0.0": "0", "false": "0", "1.0": "1", "true": "1"}  # of files that know no whole numbers
FULL_WIDTH = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")


class OddRow(Exception):
    """A row that becomes a `Rejection`; `read_source` turns it into one."""

    def __init__(self, reason: Reason, detail: str, excerpt: str = "") -> None:
        self.reason, self.detail, self.excerpt = reason, detail, excerpt


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A row's fields, checked on access; notes what had to be changed."""

    row: RawRow
    file: str
    note: Note

    def has(self, name: str) -> bool:
        """Whether there is such a field, and it is not null."""
        return isinstance(self.row.value, dict) and self.row.value.get(name) is not None

    def get(self, name: str) -> Any:
        if not isinstance(self.row.value, dict):
            raise OddRow(Reason.WRONG_TYPE, f"a JSON object is expected, not {type(self.row.value).__name__}")
        if not self.has(name):
            raise OddRow(Reason.MISSING_FIELD, f"no {name!r}")
        return self.row.value[name]

    def text(self, name: str, *, verbatim: bool = False) -> str:
        return self.checked(self.get(name), name, verbatim=verbatim)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.get(name)
        values = value if isinstance(value, list) else [value]
        return tuple(self.checked(item, name) for item in values)

    def checked(self, value: Any, name: str, *, verbatim: bool = False) -> str:
        """`value` as text that a tokenizer can take."""
        if isinstance(value, int) and not isinstance(value, bool) and not verbatim:
            self.changed(Change.NUMBER_AS_TEXT, name)
            value = str(value)
        if not isinstance(value, str):
            raise OddRow(Reason.WRONG_TYPE, f"{name!r} must be text, not {type(value).__name__}")
        if "\0" in value:
            raise OddRow(Reason.NUL_CHARACTER, f"in {name!r}", value)
        if has_surrogates(value):
            raise OddRow(Reason.UNDECODABLE_BYTES, f"{name!r} is not UTF-8{likely_encoding(value)}", value)
        text: str = value if verbatim else value.strip()
        if text != value:
            self.changed(Change.WHITESPACE_TRIMMED, name)
        return text

    def changed(self, change: Change, name: str) -> None:
        self.note(Alteration(file=self.file, row=self.row.number, change=change, detail=name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A row's content with its own id, if it has one (`row`: as in `RawRow.number`)."""

    id: str | None
    row: int
    content: Content


def parse_id(fields: Fields, name: str | None = "id") -> str | None:
    """The row's own id, text or whole number; None without one."""
    if name is None or not fields.has(name):
        return None
    if not (text := fields.text(name)):
        raise OddRow(Reason.WRONG_TYPE, f"{name!r} is empty")
    return text


def parse_question(fields: Fields) -> Fact:
    """An EntityQuestions row: question and answers; the whole file tells relation and subject."""
    question = fields.text("question")
    if not question:
        raise OddRow(Reason.EMPTY_PROMPT, "'question' is empty")
    return Fact(relation="", subject="", answers=_answers(fields), question=question)


def parse_fact(fields: Fields) -> Fact:
    """A row of a `facts` file: relation, subject, answers (text or list), and perhaps its own question."""
    relation, subject = fields.text("relation"), fields.text("subject")
    if not relation or not subject:
        raise OddRow(Reason.EMPTY_PROMPT, "'relation' or 'subject' is empty")
    question = fields.text("question") if fields.has("question") else None
    return Fact(relation=relation, subject=subject, answers=_answers(fields), question=question or None)


def _answers(fields: Fields) -> tuple[str, ...]:
    answers = fields.texts("answers")
    if not answers or not all(answers):
        raise OddRow(
            Reason.EMPTY_ANSWER, "'answers' is empty" if not answers else "one of 'answers' is empty"
        )
    return answers


def label_numbers(labels: LabelWords) -> dict[str, int]:
    """Every spelling of a label, case-folded, with its number.

    >>> label_numbers(LabelWords())["same"]
    1
    """
    words = {word.strip().casefold(): i for pair in (labels.zh, labels.en) for i, word in enumerate(pair)}
    return {bare: number for number, bare in enumerate(BARE_LABELS)} | words


def read_label(label: Any, labels: Mapping[str, int]) -> int | None:
    """The number that a label stands for, also as 1.0, true or a full-width digit; None: it stands for none.

    >>> [read_label(label, label_numbers(LabelWords())) for label in ("Same", 1.0, "\uff10", True, "2")]
    [1, 1, 0, 1, None]
    """
    spelling = str(label).strip().casefold()
    if spelling not in labels:
        spelling = unicodedata.normalize("NFKC", spelling).strip()
        spelling = OTHER_LABELS.get(spelling, spelling)
    return labels.get(spelling)


def parse_pair(fields: Fields, labels: Mapping[str, int]) -> Pair:
    """A row of a `pairs` file; `labels` is from `label_numbers`."""
    a, b = _sides(fields)
    label = fields.get("label")
    if (number := read_label(label, labels)) is None:
        raise OddRow(Reason.UNKNOWN_LABEL, f"label {label!r}")
    if str(label).strip().casefold() not in labels:
        fields.changed(Change.LABEL_SPELLING, f"label {label!r}")
    rationale = fields.text("rationale") if fields.has("rationale") else None
    pair = Pair(a=a, b=b, label=number, rationale=rationale or None)
    _note_oddities(pair, fields)
    return pair


def parse_unlabelled(fields: Fields) -> Pair:
    """A row of a file of pairs to be judged."""
    a, b = _sides(fields)
    pair = Pair(a=a, b=b, label=UNKNOWN_LABEL)
    _note_oddities(pair, fields)
    return pair


def _sides(fields: Fields) -> tuple[str, str]:
    a, b = fields.text("a"), fields.text("b")
    if not a or not b:
        raise OddRow(Reason.EMPTY_PROMPT, "one of the two texts is empty")
    if label_like := [text for text in (a, b) if unicodedata.normalize("NFKC", text) in BARE_LABELS]:
        label = f", the label {fields.row.value['label']!r}" if fields.has("label") else ""
        raise OddRow(Reason.LABEL_AS_TEXT, f"a text is {label_like[0]!r}{label}")
    return a, b


def _note_oddities(pair: Pair, fields: Fields) -> None:
    """Note what is kept as it stands, but may not be meant."""
    if pair.a == pair.b:
        fields.changed(Change.IDENTICAL_SIDES, "" if pair.label == UNKNOWN_LABEL else f"label {pair.label}")
    text = pair.a + pair.b
    if text.isascii():
        return
    if FULL_WIDTH.search(text):
        fields.changed(Change.FULL_WIDTH, "letters or digits")
    if has_both_scripts(text):
        fields.changed(Change.MIXED_SCRIPTS, "traditional and simplified")


def has_both_scripts(text: str) -> bool:
    """Whether there are characters of traditional-only and of simplified-only Chinese spelling.

    By the national character sets: GB 2312 holds simplified spellings, Big5 traditional ones.

    >>> has_both_scripts("发票怎麼開"), has_both_scripts("发票怎么开"), has_both_scripts("發票怎麼開")
    (True, False, False)
    """
    han = {char for char in text if "\u4e00" <= char <= "\u9fff"}
    simplified, traditional = ({c for c in han if _encodes(c, name)} for name in ("gb2312", "big5"))
    return bool(simplified - traditional) and bool(traditional - simplified)


@lru_cache(maxsize=2**15)
def _encodes(char: str, charset: str) -> bool:
    try:
        char.encode(charset)
    except UnicodeEncodeError:
        return False
    return True
