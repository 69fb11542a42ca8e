"""RUN/selection.jsonl: what was drawn to train on, and a record of how much of it there is.

In: rows of the drawn facts or pairs. Out: selection.jsonl, selection.manifest.json (row count, checksum).
Invariant: a file that lost rows, even at a line's end, is refused by name, never counted as a smaller draw.
Trade-off: the record is a file of its own (120 bytes), so that selection.jsonl holds rows alone, as other
programs read it; a selection of an earlier version has none and is taken as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_jsonl, read_object, sha256_of_file, write_json, write_jsonl

SELECTION, SELECTION_MANIFEST = "selection.jsonl", "selection.manifest.json"
REMEDY = "put the file back, or select again: sftcore prepare RECIPE; if the change is meant, delete {}"


def write_selection(run: Path, rows: list[dict[str, Any]]) -> None:
    """Write a run's selection and its record, unless both are there already."""
    if _holds(run, rows):
        return
    (run / SELECTION_MANIFEST).unlink(missing_ok=True)  # else a crash leaves the record of other rows
    write_jsonl(run / SELECTION, rows)
    digest = sha256_of_file(run / SELECTION)
    write_json(run / SELECTION_MANIFEST, {"num_rows": len(rows), "sha256": digest})


def _holds(run: Path, rows: list[dict[str, Any]]) -> bool:
    if not ((run / SELECTION).is_file() and (run / SELECTION_MANIFEST).is_file()):
        return False
    try:
        return read_selection(run) == rows
    except UserInputError:
        return False


def read_selection(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/selection.jsonl.

    Raises:
        UserInputError: it is damaged, or not what the record says.
    """
    path, record = run / SELECTION, run / SELECTION_MANIFEST
    rows = read_jsonl(path)
    if not record.exists():
        return rows
    written = read_object(record, "num_rows", "sha256")
    remedy = REMEDY.format(record)
    if len(rows) != written["num_rows"]:
        what = "rows are missing, or too many"
        got = f"{len(rows)}, where {record.name} says {written['num_rows']}"
        raise UserInputError(Problem(what=what, where=str(path), got=got, remedy=remedy))
    if sha256_of_file(path) != written["sha256"]:
        what = "has changed since it was written"
        raise UserInputError(Problem(what=what, where=str(path), remedy=remedy))
    return rows
