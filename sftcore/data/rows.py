"""From a file's bytes to its rows: gzip, byte-order marks, line ends, JSON, tables.

In: a path. Out: `RawRow`s in file order (a JSON value, or a table's cells), and `Rejection`s for rows that
don't parse.
Invariant: a row ends at "\\n" and nowhere else (not at U+2028 or a lone "\\r", which str.splitlines would
take); one bad row never swallows its neighbours: a stray CSV quote costs the row that it stands in.
Trade-off: bytes that are not UTF-8 survive decoding as lone surrogates, so one pass over the file finds them
row by row; only JSON lists are held whole (EntityQuestions' largest file is 0.9 MB; a list of 100 MB takes
250 MB while it is read: make JSON lines of larger ones).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from sftcore.data.ledger import Alteration, Change, Reason, Rejection, printable, printable_path
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import open_binary

BOM = "\ufeff"
FOREIGN_STARTS = {  # the longer of two that begin alike first
    b"\xff\xfe\0\0": ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\x1f\x8b": ("gzip data under a name without .gz", "rename it to end in .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "unpack it: zstd -d"),
    b"\xfd7zXZ\0": ("xz data", "unpack it: xz -d"),
    b"BZh": ("bzip2 data", "unpack it: bzip2 -d"),
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),  # "PK" alone may begin a text
}
LONGEST_START = max(map(len, FOREIGN_STARTS))
PEEKED_BYTES = 2**12
LONG_NUMBER = re.compile(r"\d{19}")
Note = Callable[[Alteration], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a file that one worker reads.

    Args:
        start: byte (text files), row group (Parquet) or row (data sets) at which it starts.
        end: where it ends, exclusive; None: at the end of the file.
        first_row: 1-based line (text files) or row that stands at `start`.
    """

    start: int = 0
    end: int | None = None
    first_row: int = 1


WHOLE = Span()


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row as it stands in the file.

    Args:
        number: 1-based; header lines do not count, blank lines do.
        value: a JSON value, or the cells of a table's row as `list[str]`.
    """

    number: int
    value: Any


def ignore(alteration: Alteration) -> None:
    """The `Note` of a pass that only counts."""


def damaged(path: Path, what: str, *, got: str = "", remedy: str = "") -> UserInputError:
    """The error for a file that is unusable as a whole."""
    return UserInputError(Problem(what=what, where=printable_path(str(path)), got=got, remedy=remedy))


@contextmanager
def read_errors_explained(path: Path) -> Iterator[None]:
    """Name the file that is cut off, a folder, or not to be read."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, f"damaged or cut-off gzip file: {error}", remedy="fetch it again") from error
    except OSError as error:
        raise damaged(path, f"can't be read: {error.strerror or error}") from error


def _decoded(path: Path, line: bytes, *, number: int, note: Note) -> str:
    """A line as text, without byte-order mark and line end."""
    text = line.decode("utf-8", "surrogateescape")
    if text.startswith(BOM):
        note(Alteration(file=str(path), row=number, change=Change.BYTE_ORDER_MARK))
        text = text.removeprefix(BOM)
    return text.rstrip("\r\n")


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, (name, remedy) in FOREIGN_STARTS.items():
        if start.startswith(magic):
            raise damaged(path, f"this is {name}, not UTF-8 text", remedy=remedy)


def text_lines(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[str]:
    """The lines of a span, without line ends; undecodable bytes become lone surrogates."""
    with read_errors_explained(path), open_binary(path) as handle:
        handle.seek(span.start)
        position = span.start
        for number, line in enumerate(handle, span.first_row):
            if number == 1:
                _refuse_foreign(path, line[:LONGEST_START])
            yield _decoded(path, line, number=number, note=note)
            position += len(line)
            if span.end is not None and position >= span.end:
                return


def suffix_of(path: Path) -> str:
    """What a file's name ends with, without .gz.

    >>> suffix_of(Path("rows.JSON.GZ"))
    '.json'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def is_json_list(path: Path) -> bool:
    """Whether a file named .json holds one list, which can't be read line by line."""
    if suffix_of(path) != ".json":
        return False
    with read_errors_explained(path), open_binary(path) as handle:
        while line := handle.readline(PEEKED_BYTES):
            if start := line.removeprefix(BOM.encode()).lstrip():
                return start.startswith(b"[")
    return False


def json_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[RawRow | Rejection]:
    """JSON lines, or the elements of a .json file that is one list (then `span` is the whole file)."""
    if not is_json_list(path):
        return json_line_rows(path, note, span)
    assert span == WHOLE
    return json_list_rows(path, note)


def json_list_rows(path: Path, note: Note = ignore) -> Iterator[RawRow]:
    """The elements of a file that is one JSON list.

    Raises:
        UserInputError: unreadable, not JSON, not a list.
    """
    text = "\n".join(text_lines(path, note))
    try:
        values = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise damaged(
            path, f"not valid JSON: {error}", remedy="a JSON list of objects is expected"
        ) from error
    if not isinstance(values, list):
        raise damaged(path, "the file must hold one JSON list of objects", got=type(values).__name__)
    for number, value in enumerate(values, 1):
        yield RawRow(number=number, value=value)


def json_line_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[RawRow | Rejection]:
    """One JSON value a line; blank lines are no rows."""
    for number, line in enumerate(text_lines(path, note, span), span.first_row):
        if not line.strip():
            continue
        try:
            yield RawRow(number=number, value=_parsed(line))
        except (ValueError, RecursionError) as error:
            yield _unparsed(path, number, line, str(error))


def _parsed(line: str) -> Any:
    """The line's JSON value; by orjson (a quarter of the time) where both agree."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:  # NaN, half a surrogate pair, ..., or not JSON at all
        return json.loads(line)
    if not _is_flat_text(value) and LONG_NUMBER.search(line):
        return json.loads(line)  # orjson makes floats of whole numbers of more than 64 bits
    return value


def _is_flat_text(value: Any) -> bool:
    """Whether this is an object of texts only, which LONG_NUMBER need not search."""
    return type(value) is dict and set(map(type, value.values())) == {str}


def _unparsed(path: Path, number: int, line: str, detail: str) -> Rejection:
    reason = Reason.UNDECODABLE_BYTES if has_surrogates(line) else Reason.UNREADABLE_LINE
    return Rejection(
        file=str(path), row=number, reason=reason, excerpt=printable(line), detail=printable(detail)
    )


def has_surrogates(text: str) -> bool:
    """Whether `text` holds what can't be UTF-8: undecodable bytes, or half of a \\ud800 escape pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def tsv_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[RawRow | Rejection]:
    """Cells split at tabs; quotes are text. The first row, a header or not, has number 1."""
    for number, line in enumerate(text_lines(path, note, span), span.first_row):
        if line:
            yield RawRow(number=number, value=line.split("\t"))


def csv_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[RawRow | Rejection]:
    r"""Cells of a comma-separated file with quotes (RFC 4180); the first row has number 1.

    A row that does not parse is rejected by its first line alone; the lines that it had swallowed in search
    of a closing quote are read again as rows of their own (the search ends after csv's 131,072 characters).
    A table with quotes is never cut: `span` must be the whole file.
    """
    assert span == WHOLE
    pending: deque[str] = deque()
    taken: list[str] = []
    lines = text_lines(path, note)

    def feed() -> Iterator[str]:
        while (line := pending.popleft() if pending else next(lines, None)) is not None:
            taken.append(line)
            yield line + "\n"

    number = 0
    reader = csv.reader(feed(), strict=True)
    while True:
        taken.clear()
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _unparsed(path, number, taken[0], str(error))
            pending.extendleft(reversed(taken[1:]))
            reader = csv.reader(feed(), strict=True)
            continue
        if cells:
            yield RawRow(number=number, value=cells)
