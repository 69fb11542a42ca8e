"""Rows of tables: cells between commas or tabs, with quotes or without.

In: a .csv, .tsv or .txt file. Out: `RawRow`s of cells, and `Rejection`s for rows that don't parse.
Invariant: one rule of quotes for all tables (RFC 4180), known by the recipe, or found in the whole file and
noted; line ends within a cell stay as they are; a stray quote costs the row that it stands in.
A file of tabs that is not quoted throughout is text; each row of it with a cell that looks quoted is noted.
Trade-off: a tab-separated file with any quote in it is read once more to see whether all are RFC 4180's
(100 MB/s); one that is quoted so is a single unit of work, since a cell of it may hold newlines.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

from sftcore.data.ledger import Alteration, Change, Rejection
from sftcore.data.rows import (
    WHOLE,
    Note,
    RawRow,
    Span,
    ignore,
    read_errors_explained,
    suffix_of,
    text_lines,
    unparsed,
    whole_lines,
)
from sftcore.fsio import open_binary

LONGEST_CELL = 2**26  # characters; csv's own limit is 131,072
CHUNK_BYTES = 2**20
SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def table_rows(
    path: Path, quotes: str = "auto", note: Note = ignore, span: Span = WHOLE
) -> Iterator[RawRow | Rejection]:
    """The cells of each row; the first row, a header or not, has number 1.

    Args:
        quotes: "csv", "none", or "auto" (`Source.quotes`).
        span: the whole file where cells may be quoted.
    """
    separator = SEPARATORS[suffix_of(path)]
    if not is_quoted(path, quotes):
        return split_rows(path, separator, note, span, is_asked=quotes == "none")
    assert span == WHOLE
    return csv_rows(path, separator, note)


def is_quoted(path: Path, quotes: str) -> bool:
    """Whether quotes around cells are to be taken off, so that a row may be longer than its line."""
    if quotes != "auto" or suffix_of(path) == ".csv":
        return quotes != "none"
    with read_errors_explained(path):
        found = path.stat()
        return _looks_quoted(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _looks_quoted(path: Path, _size: int, _modified: int) -> bool:
    """Whether all of a tab-separated file is quoted as RFC 4180 has it, and at least one cell shows so.

    A cell shows it whose quotes hold a doubled quote, a tab or a line end; so does a quoted name of a column.
    """
    if not _has_quote(path):
        return False
    width, is_shown, taken = 0, False, list[str]()

    def lines() -> Iterator[str]:
        for line in whole_lines(path):
            taken.append(line)
            yield line

    _allow_long_cells()
    reader = csv.reader(lines(), delimiter="\t", strict=True)
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error:
            return False
        if cells is None:
            return is_shown
        if not cells:
            continue
        is_first, width = not width, width or len(cells)
        if len(without_tail(cells, width)) != width:
            return False
        plain = "".join(taken).rstrip("\r\n").split("\t")
        is_shown |= plain != cells and (is_first or _needs_quotes(cells))


def _has_quote(path: Path) -> bool:
    with open_binary(path) as handle:
        return any(b'"' in chunk for chunk in iter(lambda: handle.read(CHUNK_BYTES), b""))


def _needs_quotes(cells: Sequence[str]) -> bool:
    return any(character in cell for cell in cells for character in '"\t\n')


def split_rows(
    path: Path, separator: str, note: Note = ignore, span: Span = WHOLE, *, is_asked: bool = False
) -> Iterator[RawRow | Rejection]:
    """Cells between separators; quotes are text, noted of cells that look quoted unless asked for."""
    for number, line in enumerate(text_lines(path, note, span), span.first_row):
        if line:
            cells = line.split(separator)
            if '"' in line and not is_asked and any(map(_looks_wrapped, cells)):
                note(Alteration(file=str(path), row=number, change=Change.QUOTES_KEPT))
            yield RawRow(number=number, value=cells)


def _looks_wrapped(cell: str) -> bool:
    r"""Whether a cell that is read as it stands may have been quoted by its writer.

    >>> [_looks_wrapped(cell) for cell in ('"x"', '"say ""hi"" "', '"open', 'say "hi"', '5" disk')]
    [True, True, True, False, False]
    """
    return cell.startswith('"') and (cell.endswith('"') or '"' not in cell[1:] or '""' in cell)


def csv_rows(path: Path, separator: str = ",", note: Note = ignore) -> Iterator[RawRow | Rejection]:
    r"""Cells with quotes (RFC 4180); the first row has number 1.

    A row that does not parse is rejected by its first line alone; the lines that it had swallowed in search
    of a closing quote are read again as rows of their own. Quotes in a table of tabs are noted.
    """
    pending: deque[str] = deque()
    taken: list[str] = []
    lines = whole_lines(path, note)

    def feed() -> Iterator[str]:
        while (line := pending.popleft() if pending else next(lines, None)) is not None:
            taken.append(line)
            yield line

    _allow_long_cells()
    number = 0
    reader = csv.reader(feed(), delimiter=separator, strict=True)
    while True:
        taken.clear()
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield unparsed(path, number, taken[0], str(error))
            pending.extendleft(reversed(taken[1:]))
            reader = csv.reader(feed(), delimiter=separator, strict=True)
            continue
        if cells:
            if separator == "\t" and any('"' in line for line in taken):
                note(Alteration(file=str(path), row=number, change=Change.QUOTES_READ))
            yield RawRow(number=number, value=cells)


def _allow_long_cells() -> None:
    csv.field_size_limit(LONGEST_CELL)  # of the whole process


def without_tail(cells: Sequence[str], width: int) -> Sequence[str]:
    """`cells` without empty ones beyond `width`, which spreadsheets write for columns once used.

    >>> without_tail(["a", "b", "", ""], 2), without_tail(["a", "b", "c"], 2)
    (['a', 'b'], ['a', 'b', 'c'])
    """
    has_content = any(chain.from_iterable(cells[width:]))
    return cells if has_content else cells[:width]


def num_named(header: Sequence[str]) -> int:
    """Columns of a header up to the last that has a name.

    >>> num_named(["a", "", "b", "", ""])
    3
    """
    return max((i + 1 for i, name in enumerate(header) if name.strip()), default=len(header))
