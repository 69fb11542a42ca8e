"""The training files cut into units of work: byte ranges, row groups or whole files.

In: the training sources. Out: numbered `Unit`s; each becomes one part of the store.
Invariant: units depend on the files' bytes alone, not on the number of workers, so an interrupted prepare
goes on with any number of them; together the units of a file hold each of its rows once.
Trade-off: line numbers need a count of the newlines before each range, one more read of the file; files
that can't be cut (gzip, CSV, whose quotes may hold newlines, JSON lists, anything under `limit`) are one
unit each.

    rows.jsonl   |aaa\\n bb\\n cccc\\n|dd\\n e\\n fff\\n|g\\n|     "|" is the first line end after part_bytes
    unit          0                 1             2
    first_row     1                 4             7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcore.config import Source
from sftcore.data.arrow import arrow_spans, dataset_files, is_arrow, is_dataset
from sftcore.data.cells import SEPARATORS, is_quoted
from sftcore.data.records import shares_of
from sftcore.data.rows import WHOLE, Span, is_json_list, read_errors_explained, suffix_of
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import source_files
from sftcore.settings import LabelWords
from sftcore.shares import Share

PART_BYTES = 2**20  # about 0.5 s of work
SMALLEST_SHARE = 4  # the last parts are a quarter of that, so that workers end together
MAX_PARTS = 512  # each is three memory maps when the store is open
COUNTED_BYTES = 2**20
LINE_FORMATS = (".jsonl", ".tsv", ".txt", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one worker reads at a time.

    Args:
        number: 0-based over all units; its part of the store is named by it.
        source: 0-based position in data.train.
        file: path, or `hub:` name.
        span: which stretch of the file.
        limit: rows to take at most; None: all.
        num_bytes: about how much there is to read, for even shares.
    """

    number: int
    source: int
    file: Path
    span: Span
    limit: int | None
    num_bytes: int


def cut_sources(sources: Sequence[Source], labels: LabelWords, part_bytes: int = PART_BYTES) -> list[Unit]:
    """All units of the training sources, in the order of sources, files and rows.

    Raises:
        UserInputError: naming every file that can't be read.
    """
    problems: list[Problem] = []
    pieces: list[tuple[int, Path, Span, int | None, int]] = []
    left = sum(_num_bytes(source, file) for source in sources for file in source_files(source))
    part_bytes = max(part_bytes, left // MAX_PARTS)
    for number, source in enumerate(sources):
        files = source_files(source)
        for file, share in zip(files, shares_of(source, files, labels, problems), strict=True):
            left -= _num_bytes(source, file)
            if share == 0:
                continue
            try:
                spans = _cut_file(source, file, part_bytes, left)
            except UserInputError as error:
                problems += error.problems
                continue
            pieces += [(number, file, span, share, num_bytes) for span, num_bytes in spans]
    if problems:
        raise UserInputError(*problems)
    return [
        Unit(number=i, source=source, file=file, span=span, limit=share, num_bytes=num_bytes)
        for i, (source, file, span, share, num_bytes) in enumerate(pieces)
    ]


def _num_bytes(source: Source, file: Path) -> int:
    files = dataset_files(source, file) if is_dataset(file) else [file]
    return sum(f.stat().st_size for f in files if f.is_file())


def _cut_file(source: Source, file: Path, part_bytes: int, left: int) -> list[tuple[Span, int]]:
    if source.limit is not None or source.format == "entityquestions":
        return [(WHOLE, _num_bytes(source, file))]
    if is_arrow(file):
        return arrow_spans(source, file, part_bytes)
    if file.suffix.lower() not in LINE_FORMATS:
        return [(WHOLE, _num_bytes(source, file))]
    is_table = suffix_of(file) in SEPARATORS and (source.format == "pairs" or suffix_of(file) != ".txt")
    if is_quoted(file, source.quotes) if is_table else is_json_list(file):
        return [(WHOLE, _num_bytes(source, file))]
    with read_errors_explained(file):
        return _cut_lines(file, part_bytes, left)


def _cut_lines(file: Path, part_bytes: int, left: int) -> list[tuple[Span, int]]:
    """Byte ranges that end at line ends; a line longer than `part_bytes` is never cut.

    Args:
        part_bytes: of a range at most, but for its last line.
        left: bytes of the files after this one; ranges shrink where little is left.
    """
    spans: list[tuple[Span, int]] = []
    start, first_row, size = 0, 1, file.stat().st_size
    with open(file, "rb") as handle:
        while start < size:
            share = (size - start + left) // SMALLEST_SHARE
            handle.seek(start + min(part_bytes, max(share, part_bytes // SMALLEST_SHARE, 1)))
            handle.readline()
            end = min(handle.tell(), size)
            spans.append((Span(start=start, end=end, first_row=first_row), end - start))
            handle.seek(start)
            for position in range(start, end, COUNTED_BYTES):
                first_row += handle.read(min(COUNTED_BYTES, end - position)).count(b"\n")
            start = end
    return spans or [(WHOLE, 0)]


def share_of_job(units: Sequence[Unit], share: Share) -> list[Unit]:
    """A job's units: largest first to the job with the least bytes."""
    load = [0] * share.num_jobs
    mine: list[Unit] = []
    for unit in sorted(units, key=lambda unit: (-unit.num_bytes, unit.number)):
        target = load.index(min(load))
        load[target] += unit.num_bytes + 1
        if target == share.job:
            mine.append(unit)
    return mine
