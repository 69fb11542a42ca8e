"""From a file's bytes to its rows: gzip, byte-order marks, line ends, JSON.

In: a path. Out: `RawRow`s in file order, and `Rejection`s for rows that don't parse.
Invariant: a row ends at "\\n" and nowhere else (not at U+2028 or a lone "\\r", which str.splitlines would
take); one bad row never swallows its neighbours.
Trade-off: bytes that are not UTF-8 survive decoding as lone surrogates, so one pass over the file finds them
row by row; only JSON lists are held whole (EntityQuestions' largest file is 0.9 MB; a list of 100 MB takes
250 MB while it is read: make JSON lines of larger ones).
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
import zlib
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
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save the sheet as CSV, in UTF-8"),
    b"ARROW1": ("an Arrow file", "give the folder that `Dataset.save_to_disk` wrote, or Parquet"),
    b"\x93NUMPY": ("a NumPy file", "write JSON lines"),
    b"SQLite format 3": ("an SQLite database", "write JSON lines"),
    b"%PDF": ("a PDF", "extract its text"),
}
OFFICE = {  # what the archive of an office program holds
    "xl/workbook.xml": ("an Excel workbook", "save the sheet as CSV, in UTF-8"),
    "word/document.xml": ("a Word document", "save it as text"),
    "content.xml": ("an OpenDocument file", "save the sheet as CSV, in UTF-8"),
}
ZEROS_OF_TEXT = 0.1  # more NULs than this share of a first line: two or four bytes a character
PEEKED_BYTES = 2**12
RUNNING = ("GB18030", "BIG5", "SHIFT_JIS", "EUC-JP", "EUC-KR")  # encodings of runs of bytes, 2 a character
ALPHABETS = ("WINDOWS-1251", "KOI8-R", "ISO-8859-5", "ISO-8859-7")  # 1 a character, with capitals
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
    """A line as text, without byte-order mark."""
    text = line.decode("utf-8", "surrogateescape")
    if text.startswith(BOM):
        note(Alteration(file=str(path), row=number, change=Change.BYTE_ORDER_MARK))
        text = text.removeprefix(BOM)
    return text


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, (name, remedy) in FOREIGN_STARTS.items():
        if start.startswith(magic):
            name, remedy = _office(path) or (name, remedy)
            raise damaged(path, f"this is {name}, not UTF-8 text", remedy=remedy)
    if start and not start.strip(b"\0"):
        raise damaged(path, "it begins with zeros only: a cut-off copy or download", remedy="fetch it again")
    if start[:PEEKED_BYTES].count(0) > ZEROS_OF_TEXT * len(start[:PEEKED_BYTES]):
        remedy = "convert it: iconv -f UTF-16LE -t UTF-8 (or UTF-16BE, UTF-32LE)"
        raise damaged(path, "this is UTF-16 or UTF-32 text without a mark, not UTF-8 text", remedy=remedy)


def _office(path: Path) -> tuple[str, str] | None:
    """What a zip archive is that an office program wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    return next((about for name, about in OFFICE.items() if name in names), None)


def text_lines(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[str]:
    """The lines of a span, without line ends; undecodable bytes become lone surrogates."""
    return (line.rstrip("\r\n") for line in whole_lines(path, note, span))


def whole_lines(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[str]:
    """The lines of a span with their ends, as in `text_lines`."""
    with read_errors_explained(path), open_binary(path) as handle:
        if span.first_row == 1:
            _refuse_foreign(path, handle.readline(PEEKED_BYTES))
        handle.seek(span.start)
        position = span.start
        for number, line in enumerate(handle, span.first_row):
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
    """Whether a file holds one list, which can't be read line by line.

    One named .json does if it starts like a list; another (.jsonl) if all of it is one.
    """
    with read_errors_explained(path), open_binary(path) as handle:
        while line := handle.readline(PEEKED_BYTES):
            if start := line.removeprefix(BOM.encode()).lstrip():
                if not start.startswith(b"["):
                    return False
                return suffix_of(path) == ".json" or _is_one_list(start + handle.read())
    return False


def _is_one_list(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), list)
    except orjson.JSONDecodeError:  # lines of lists, or a damaged one, which costs its row
        return False


def json_rows(path: Path, note: Note = ignore, span: Span = WHOLE) -> Iterator[RawRow | Rejection]:
    """JSON lines, or the elements of a file that is one list (then `span` is the whole file)."""
    if not is_json_list(path):
        return json_line_rows(path, note, span)
    assert span == WHOLE
    if suffix_of(path) != ".json":
        note(Alteration(file=str(path), row=1, change=Change.JSON_LIST))
    return json_list_rows(path, note)


def json_list_rows(path: Path, note: Note = ignore) -> Iterator[RawRow]:
    """The elements of a file that is one JSON list.

    Raises:
        UserInputError: unreadable, not JSON, not a list.
    """
    text = "\n".join(text_lines(path, note))
    try:
        values = json.loads(text, object_pairs_hook=_once) if text.strip() else []
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
            yield unparsed(path, number, line, str(error))


def _parsed(line: str) -> Any:
    """The line's JSON value; by orjson (a quarter of the time) where both agree.

    Raises:
        ValueError: no JSON, or an object that says the same key twice (a reader would take the last).
    """
    value = _value(line)
    if line.count('":') != _num_keys(value) or '" :' in line:  # else each key stands there once
        json.loads(line, object_pairs_hook=_once)
    return value


def _num_keys(value: Any) -> int:
    """Keys of all objects within a value."""
    if isinstance(value, dict):
        return len(value) + sum(_num_keys(v) for v in value.values() if type(v) is not str)
    if isinstance(value, list):
        return sum(_num_keys(v) for v in value if type(v) is not str)
    return 0


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in an object"
        )
    return found


def _value(line: str) -> Any:
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


def unparsed(path: Path, number: int, line: str, detail: str) -> Rejection:
    """The rejection of a row that is no JSON, or no row of a table."""
    reason = Reason.UNREADABLE_LINE
    if has_surrogates(line):
        reason, detail = Reason.UNDECODABLE_BYTES, f"not UTF-8{likely_encoding(line)}"
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


def likely_encoding(text: str) -> str:
    """Where undecodable bytes start, and what they may have been meant as, for a message.

    Western European letters beyond ASCII come one at a time between others; other scripts in runs, of which
    all encodings are named that can read them.

    >>> likely_encoding("caf\\udce9 cr\\udce8me")
    ', at its byte 4 (WINDOWS-1252?)'
    >>> likely_encoding("\\udcb1\\udcb1\\udcbe\\udca9")
    ', at its byte 1 (GB18030, BIG5, SHIFT_JIS, EUC-JP, EUC-KR or ISO-8859-5?)'
    """
    try:
        raw = text.encode("utf-8", "surrogateescape")
        raw.decode("utf-8")
    except UnicodeEncodeError:  # half of a \\ud800 escape pair
        return ""
    except UnicodeDecodeError as error:
        *names, last = _encodings(raw) or [""]
        guess = f"{', '.join(names)} or {last}" if names else last
        return f", at its byte {error.start + 1}" + (f" ({guess}?)" if guess else "")
    return ""


def _encodings(raw: bytes) -> list[str]:
    """Encodings that bytes may be in."""
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", raw)]
    if 2 * sum(n for n in runs if n > 1) <= sum(runs):
        return ["WINDOWS-1252"]
    if _looks_chinese(raw):
        return ["GB18030"]
    names = [name for name in RUNNING if _decodes(raw, name)]
    return names + [name for name in ALPHABETS if _reads_as_words(raw, name)]


def _looks_chinese(raw: bytes) -> bool:
    """Whether most characters are of GB 2312's 3,755 common ones, one of them where Korean has none."""
    try:
        pairs = [char.encode("gb18030") for char in raw.decode("gb18030") if char > "\x7f"]
    except UnicodeDecodeError:
        return False
    common = [pair for pair in pairs if 0xB0 <= pair[0] <= 0xD7 and len(pair) == 2 and pair[1] > 0xA0]
    return 2 * len(common) > len(pairs) and any(pair[0] > 0xC8 for pair in common)


def _reads_as_words(raw: bytes, encoding: str) -> bool:
    """Whether bytes above ASCII are letters, with capitals at the start of words only or throughout.

    KOI8-R has small letters where WINDOWS-1251 has capitals, so one reads as the other with its case swapped.
    """
    try:
        words = re.findall(r"[^\x00-\x7f]+", raw.decode(encoding))
    except UnicodeDecodeError:
        return False
    return all(word.isalpha() and (word.isupper() or word[1:] == word[1:].lower()) for word in words)


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
