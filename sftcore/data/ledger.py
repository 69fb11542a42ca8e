"""The account of every row that was dropped and every text that was changed.

In: `Rejection`s and `Alteration`s, as they occur. Out: totals by reason, ledger.jsonl, or one error.
Invariant: rows read = records + rejections; a rejection is always listed with file, row and reason.
Trade-off: entries are spooled as JSON lines, in memory up to 1 MiB and in a temporary file beyond that, so a
million rejected rows cost 200 MB of disk but no RAM; alterations are all counted, but only the first 20 of
each kind are listed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, TypeVar

from sftcore.amounts import counted
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import disk_errors_explained, write_jsonl

T = TypeVar("T")
EXCERPT_CHARACTERS = 80
DETAIL_CHARACTERS = 200
LISTED_ALTERATIONS_PER_KIND = 20
SPOOL_BYTES = 2**20


class Reason(StrEnum):
    """Why a row did not become a sample."""

    UNREADABLE_LINE = "unreadable_line"
    UNDECODABLE_BYTES = "undecodable_bytes"
    NUL_CHARACTER = "nul_character"
    WRONG_TYPE = "wrong_type"
    WRONG_FIELD_COUNT = "wrong_field_count"
    MISSING_FIELD = "missing_field"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_ANSWER = "empty_answer"
    UNKNOWN_LABEL = "unknown_label"
    DUPLICATE_ID = "duplicate_id"
    DUPLICATE = "duplicate"
    CONTRADICTORY_LABEL = "contradictory_label"
    LEAK = "leak"
    SHORT_ANSWER = "short_answer"
    ANSWER_IN_SUBJECT = "answer_in_subject"
    UNKNOWN_RELATION = "unknown_relation"
    REFUSED_BY_TEMPLATE = "refused_by_template"
    NO_TOKENS = "no_tokens"
    OVERLENGTH = "overlength"
    LABEL_AS_TEXT = "label_as_text"
    NO_RATIONALE = "no_rationale"
    SPECIAL_TOKEN = "special_token"
    NO_REPLY = "no_reply"
    UNKNOWN_KEY = "unknown_key"


HYGIENE = frozenset({Reason.DUPLICATE, Reason.CONTRADICTORY_LABEL, Reason.LEAK})
TRIVIAL = frozenset(
    {Reason.SHORT_ANSWER, Reason.ANSWER_IN_SUBJECT}
)  # facts that are neither probed nor scored
PROMPTING = frozenset(
    {
        Reason.UNKNOWN_RELATION,
        Reason.REFUSED_BY_TEMPLATE,
        Reason.NO_TOKENS,
        Reason.OVERLENGTH,
        Reason.NO_RATIONALE,
        Reason.SPECIAL_TOKEN,
        Reason.NO_REPLY,
    }
)
READING = frozenset(Reason) - HYGIENE - PROMPTING - TRIVIAL

REMEDIES = {
    Reason.MISSING_FIELD: "name the fields in `columns` of the source: {prompt: ..., completion: ...} or"
    " {messages: ...} (jsonl), {a: ..., b: ..., label: ...} (pairs)",
    Reason.UNKNOWN_LABEL: "labels are 0, 1 or a word of matching.labels",
    Reason.UNDECODABLE_BYTES: "save the file as UTF-8: iconv -f ENCODING -t UTF-8 (each row has a guess)",
    Reason.DUPLICATE_ID: "is a file listed twice, or an id given twice?"
    " `columns: {id: null}` of the source numbers its rows",
    Reason.UNKNOWN_KEY: "name what is no part of the prompt in `columns: {ignore: [...]}` of the source;"
    " what changes training can't be left out in silence (thoughts go into the content, as the chat template"
    " writes them: <think>...</think>)",
    Reason.REFUSED_BY_TEMPLATE: "where the template knows no system role: `data.system: merge` (into the next"
    " user turn) or drop; where it writes earlier answers otherwise: `data.train_answers: last`; another"
    " template: `model.chat_template: NAME or FILE`",
    Reason.OVERLENGTH: "raise data.max_length, or set data.overlength: trim_prompt",
    Reason.WRONG_FIELD_COUNT: "is a tab or comma inside a text? use JSONL, or CSV with quotes",
    Reason.UNKNOWN_RELATION: "give each fact its own question",
    Reason.LABEL_AS_TEXT: "a text column holds labels: fix `columns` of the source",
    Reason.NO_RATIONALE: "train on pairs that have one (sftcore rationales RECIPE writes them)",
    Reason.SPECIAL_TOKEN: "take the tokenizer's special tokens out of the messages"
    " (pre-rendered chats go into `prompt` and `completion`)",
    Reason.NO_REPLY: "end held-out chats with the assistant's reply, with which a model's is compared",
}


class Change(StrEnum):
    """What was done to a row that was kept."""

    BYTE_ORDER_MARK = "byte_order_mark"
    WHITESPACE_TRIMMED = "whitespace_trimmed"
    NUMBER_AS_TEXT = "number_as_text"
    HEADER_ASSUMED = "header_assumed"
    HEADER_ABSENT = "header_absent"
    DUPLICATE_KEPT = "duplicate_kept"
    SEAM_APART = "seam_apart"
    PROMPT_TRIMMED = "prompt_trimmed"
    BOS_IN_TEXT = "bos_in_text"
    STOP_IN_TEXT = "stop_in_text"
    IDENTICAL_SIDES = "identical_sides"
    MIXED_SCRIPTS = "mixed_scripts"
    FULL_WIDTH = "full_width"
    SPECIAL_IN_TEXT = "special_in_text"
    PARTS_JOINED = "parts_joined"
    COLUMN_LEFT_OUT = "column_left_out"
    SYSTEM_FROM_COLUMN = "system_from_column"
    SYSTEM_MERGED = "system_merged"
    SYSTEM_DROPPED = "system_dropped"
    EARLIER_UNTRAINED = "earlier_untrained"
    MARKER_IN_TEXT = "marker_in_text"
    ANSWER_NORMALISED = "answer_normalised"
    QUOTES_READ = "quotes_read"
    QUOTES_KEPT = "quotes_kept"
    LABEL_SPELLING = "label_spelling"
    JSON_LIST = "json_list"
    OTHER_ANSWER = "other_answer"


def printable(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """`text` on one line, at most `limit` characters, with undecodable bytes written as escapes."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def printable_path(path: str) -> str:
    """A path as text that can be encoded (file names may hold any bytes)."""
    return path.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A row that was dropped.

    Args:
        file: path of the file it stands in.
        row: 1-based; header lines do not count.
        reason: why.
        excerpt: the offending text, shortened, printable.
        detail: what exactly, where the reason alone does not say it, e.g. the field's name.
    """

    file: str
    row: int
    reason: Reason
    excerpt: str = ""
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{printable_path(self.file)}:{self.row}: {self.reason}{detail}: {self.excerpt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alteration:
    """A row that was kept, but not as it stood in the file (fields as in `Rejection`)."""

    file: str
    row: int
    change: Change
    detail: str = ""


class Ledger:
    """Counts and lists what happened to the rows of one split; used by one thread."""

    def __init__(self) -> None:
        self.num_rows_read = 0
        self.num_not_selected = 0
        self.rejected_by_reason: Counter[str] = Counter()
        self.altered_by_reason: Counter[str] = Counter()
        self._first: dict[Reason, list[Rejection]] = {}
        self._spool: IO[str] = tempfile.SpooledTemporaryFile(
            SPOOL_BYTES, "w+", encoding="utf-8", newline="\n"
        )

    @property
    def num_rejected(self) -> int:
        """Rows dropped for any reason."""
        return sum(self.rejected_by_reason.values())

    def take(self, rows: Iterable[T | Rejection]) -> Iterator[T]:
        """Count `rows`, keep the rejections, pass on the rest."""
        for row in rows:
            self.num_rows_read += 1
            if isinstance(row, Rejection):
                self.reject(row)
            else:
                yield row

    def reject(self, rejection: Rejection) -> None:
        """Record a dropped row."""
        self.rejected_by_reason[rejection.reason] += 1
        first = self._first.setdefault(rejection.reason, [])
        if len(first) < 3:
            first.append(rejection)
        self._list({"kind": "rejected", **asdict(rejection)})

    def alter(self, alteration: Alteration) -> None:
        """Record a change; listed only while its kind has been seen fewer than 20 times."""
        self.altered_by_reason[alteration.change] += 1
        if self.altered_by_reason[alteration.change] <= LISTED_ALTERATIONS_PER_KIND:
            self._list({"kind": "altered", **asdict(alteration)})

    def absorb(
        self, entries: Iterable[dict[str, Any]], *, num_rows_read: int, altered: dict[str, int]
    ) -> None:
        """Take over another ledger: its entries, the rows it read, all alterations it counted."""
        self.num_rows_read += num_rows_read
        listed = Counter(self.altered_by_reason)
        for entry in entries:
            kind = entry.pop("kind")
            if kind == "rejected":
                self.reject(Rejection(**entry | {"reason": Reason(entry["reason"])}))
            elif listed[entry["change"]] < LISTED_ALTERATIONS_PER_KIND:
                listed[entry["change"]] += 1
                self._list({"kind": kind, **entry})
        self.altered_by_reason.update(altered)

    def _list(self, entry: dict[str, Any]) -> None:
        entry["file"] = printable_path(entry["file"])
        with disk_errors_explained(Path(tempfile.gettempdir())):
            self._spool.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def entries(self) -> Iterator[dict[str, Any]]:
        """What ledger.jsonl will hold: kind (rejected or altered) and the fields of the noun."""
        self._spool.seek(0)
        for line in self._spool:
            yield json.loads(line)
        self._spool.seek(0, 2)

    def write(self, path: Path) -> None:
        """Write ledger.jsonl."""
        write_jsonl(path, self.entries())

    def check(self, max_fraction: float, *, reasons: frozenset[Reason], num_rows: int) -> None:
        """Refuse data of which too many rows were dropped.

        Args:
            max_fraction: `data.max_reject_fraction`.
            reasons: the rejections that count here: `READING` of the rows read, `PROMPTING` of the records
                offered to the template. What `HYGIENE` drops is no fault of the file and never counts.
            num_rows: of how many rows.

        Raises:
            UserInputError: with counts by reason, the first three rows and the remedy.
        """
        num_rejected = sum(n for reason, n in self.rejected_by_reason.items() if reason in reasons)
        if num_rejected > max_fraction * num_rows:
            raise UserInputError(self.problem(reasons, num_rows=num_rows, max_fraction=max_fraction))

    def problem(self, reasons: frozenset[Reason], *, num_rows: int, max_fraction: float) -> Problem:
        """The message of `check`."""
        counts = {reason: self.rejected_by_reason[reason] for reason in Reason if reason in reasons}
        counts = {reason: n for reason, n in counts.items() if n}
        first = [rejection for reason in counts for rejection in self._first[reason]]
        remedies = [REMEDIES[reason] for reason in counts if reason in REMEDIES]
        remedies.append(f"fix the rows, or allow more: data.max_reject_fraction (now {max_fraction:g})")
        return Problem(
            what=f"{sum(counts.values())} of {counted(num_rows, 'row')} can't be used",
            where=printable_path(first[0].file) if first else "",
            got=", ".join(f"{reason}: {n}" for reason, n in counts.items())
            + "".join(f"\n      {rejection}" for rejection in first[:3]),
            remedy="; ".join(remedies),
        )
