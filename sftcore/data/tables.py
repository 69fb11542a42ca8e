"""From a table's cells to the three texts of a pair: which columns, and is there a header?

In: rows of a TSV, CSV, JSONL or JSON file and the recipe's `columns`. Out: rows {"a", "b", "label"}.
Invariant: a first line is taken for a header only if it names the columns, or if its label cell is neither a
label nor a number; either way the decision is noted in the ledger when the recipe did not state it.
Trade-off: a row with another number of cells than the first is rejected rather than guessed at: a stray tab
in one text would otherwise shift the label (cost: that row).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sftcore.data.cells import SEPARATORS, num_named, table_rows, without_tail
from sftcore.data.ledger import REMEDIES, Alteration, Change, Reason, Rejection, printable
from sftcore.data.rows import (
    WHOLE,
    Note,
    RawRow,
    Span,
    damaged,
    has_surrogates,
    ignore,
    json_rows,
    suffix_of,
)
from sftcore.errors import UserInputError
from sftcore.sources import PRESETS, Columns

EXTENSIONS = (".tsv", ".txt", ".csv", ".jsonl", ".json")
OTHERS = "other columns"  # of a pair's row: name -> what stands there
KNOWN_NAMES = frozenset((names["a"], names["b"]) for names in PRESETS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a table's fields stand.

    Args:
        positions: 0-based cell of each field that the table has.
        num_cells: cells in each row.
        has_header: whether the first row is one.
        assumption: what was decided without being said, if anything.
        others: 0-based cell of each column that is not read, by its name in the first line; none where
            columns are chosen by number.
    """

    positions: dict[str, int]
    num_cells: int
    has_header: bool
    assumption: Change | None = None
    others: Mapping[str, int] = field(default_factory=dict)


def pair_rows(
    path: Path,
    columns: Columns,
    *,
    is_label: Callable[[str], bool],
    quotes: str = "auto",
    note: Note = ignore,
    span: Span = WHOLE,
) -> Iterator[RawRow | Rejection]:
    """Rows of a `pairs` file as {"a": ..., "b": ..., "label": ...}; a JSON row may lack some.

    A span that starts further down takes its layout from the file's first line.

    Raises:
        UserInputError: an extension that isn't known, or columns that the file doesn't have.
    """
    suffix = suffix_of(path)
    if suffix not in EXTENSIONS:
        allowed = ", ".join(EXTENSIONS)
        raise damaged(path, f"pairs are read from {allowed} (also .gz)", got=suffix or "no extension")
    if suffix not in SEPARATORS:
        return object_rows(path, columns, json_rows(path, note, span))
    rows = table_rows(path, quotes, note, span)
    if span.start:
        layout = find_layout(path, _first_cells(table_rows(path, quotes)), columns, is_label)
        return _rows_in_layout(path, layout, rows)
    return _table_rows(path, columns, is_label, rows, note)


def _first_cells(rows: Iterator[RawRow | Rejection]) -> list[str]:
    first = next(rows, None)
    return first.value if isinstance(first, RawRow) else []


def choose_columns(path: Path, layouts: Sequence[Columns]) -> Columns:
    """The first of some layouts whose two texts the first row of a file names, else the first of all."""
    suffix = suffix_of(path)
    if suffix not in EXTENSIONS:
        return layouts[0]
    first = next(table_rows(path) if suffix in SEPARATORS else json_rows(path), None)
    names = [str(name).strip() for name in first.value] if isinstance(first, RawRow) else []
    return next((layout for layout in layouts if layout.a in names and layout.b in names), layouts[0])


def object_rows(
    path: Path, columns: Columns, rows: Iterator[RawRow | Rejection]
) -> Iterator[RawRow | Rejection]:
    """The rows' objects with the names of `columns` replaced by a, b and label, other fields under OTHERS."""
    names = columns.of_pair() | ({columns.id: columns.id} if columns.id else {})
    if not all(isinstance(name, str) for name in names.values()):
        remedy = f"name the fields in {'--a and --b' if columns.label is None else '`columns`'}"
        raise damaged(path, "columns by number need a TSV or CSV file", remedy=remedy)
    for row in rows:
        if isinstance(row, RawRow) and isinstance(row.value, dict):
            value = {part: row.value[name] for part, name in names.items() if name in row.value}
            read = set(names.values())
            others = {name: said for name, said in row.value.items() if name not in read}
            yield RawRow(number=row.number, value=value | ({OTHERS: others} if others else {}))
        else:
            yield row


def _table_rows(
    path: Path,
    columns: Columns,
    is_label: Callable[[str], bool],
    rows: Iterator[RawRow | Rejection],
    note: Note,
) -> Iterator[RawRow | Rejection]:
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first, Rejection):
        raise damaged(path, f"the first line can't be read: {first.detail}", got=first.excerpt)
    layout = find_layout(path, first.value, columns, is_label)
    if layout.assumption:
        detail = printable(" | ".join(first.value))
        note(Alteration(file=str(path), row=1, change=layout.assumption, detail=detail))
    if not layout.has_header:
        yield _pair_of(path, first, layout, number=first.number)
    yield from _rows_in_layout(path, layout, rows)


def _rows_in_layout(
    path: Path, layout: Layout, rows: Iterator[RawRow | Rejection]
) -> Iterator[RawRow | Rejection]:
    for row in rows:
        number = (row.number if isinstance(row, RawRow) else row.row) - layout.has_header
        yield _pair_of(path, row, layout, number=number)


def _pair_of(path: Path, row: RawRow | Rejection, layout: Layout, *, number: int) -> RawRow | Rejection:
    """One row's cells by field; `number` leaves the header out of the count."""
    if isinstance(row, Rejection):
        return replace(row, row=number)
    if len(cells := without_tail(row.value, layout.num_cells)) != layout.num_cells:
        return Rejection(
            file=str(path),
            row=number,
            reason=Reason.WRONG_FIELD_COUNT,
            excerpt=printable(" | ".join(row.value)),
            detail=f"{len(row.value)} fields, not {layout.num_cells}",
        )
    value: dict[str, Any] = {part: cells[place] for part, place in layout.positions.items()}
    if layout.others:
        value[OTHERS] = {name: cells[place] for name, place in layout.others.items()}
    return RawRow(number=number, value=value)


def find_layout(path: Path, cells: list[str], columns: Columns, is_label: Callable[[str], bool]) -> Layout:
    """Decide from the first row where the fields are.

    Three columns whose last holds a label are read as (a, b, label) when none of the names is found: a corpus
    with and without header lines (LCQMC is spread both ways) then needs one recipe only. Where no label is
    wanted, so are two columns.

    Raises:
        UserInputError: a named or numbered column is not there.
    """
    cells = cells[: num_named(cells)]
    wanted = columns.of_pair()
    optional = wanted.pop("rationale")
    header = [cell.strip() for cell in cells]
    missing = [name for name in wanted.values() if not _is_there(name, header)]
    is_unnamed = len(missing) == len(wanted) and all(isinstance(name, str) for name in missing)
    is_labelled = len(cells) == 3 and is_label(cells[2])
    if is_unnamed and (is_labelled or (len(cells) == 2 and "label" not in wanted)):
        positions = {part: place for place, part in enumerate(wanted)}
        return Layout(
            positions=positions, num_cells=len(cells), has_header=False, assumption=Change.HEADER_ABSENT
        )
    if missing:
        raise _no_column(path, missing[0], cells, columns)
    if twice := [name for name in wanted.values() if isinstance(name, str) and header.count(name) > 1]:
        what = f"the first line names two columns {twice[0]!r}"
        raise damaged(path, what, remedy="set `columns` of the source to their 0-based numbers")
    if _is_there(optional, header):
        wanted["rationale"] = optional
    positions = {f: header.index(name) if isinstance(name, str) else name for f, name in wanted.items()}
    named = any(isinstance(name, str) for name in wanted.values())
    assumed = not named and _looks_named(header, positions, is_label)
    return Layout(
        positions=positions,
        num_cells=len(cells),
        has_header=named or assumed,
        assumption=Change.HEADER_ASSUMED if assumed else None,
        others=_others(header, positions) if named else {},
    )


def _others(header: Sequence[str], positions: Mapping[str, int]) -> dict[str, int]:
    """Where the columns stand that are not read."""
    return {name: place for place, name in enumerate(header) if place not in positions.values()}


def _looks_named(header: list[str], positions: dict[str, int], is_label: Callable[[str], bool]) -> bool:
    """Whether a first row holds names: a label that is none, or a known corpus's names of the two texts."""
    label = header[positions["label"]] if "label" in positions else ""
    has_other_label = bool(label) and not is_label(label) and not label.lstrip("-").isdigit()
    return has_other_label or (header[positions["a"]], header[positions["b"]]) in KNOWN_NAMES


def _no_column(path: Path, missing: str | int, cells: Sequence[str], columns: Columns) -> UserInputError:
    """`columns.label` is None where somebody asks on the command line and has no source to fix."""
    first_row = f"first row: {printable(' | '.join(cells))}"
    if has_surrogates("".join(cells)):
        remedy = REMEDIES[Reason.UNDECODABLE_BYTES]
        return damaged(path, f"no column {missing!r}: this is not UTF-8 text", got=first_row, remedy=remedy)
    near = difflib.get_close_matches(str(missing), [cell.strip() for cell in cells], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    how = "give --a and --b" if columns.label is None else "set `columns: {a:, b:, label:}` of the source"
    return damaged(
        path,
        f"no column {missing!r}",
        got=first_row,
        remedy=f"{hint}{how}: header names or 0-based numbers",
    )


def _is_there(column: str | int, header: list[str]) -> bool:
    return column in header if isinstance(column, str) else 0 <= column < len(header)
