"""A selection that lost rows is refused by name wherever it is read, and drawn again by what wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftcore.data.selection_file import SELECTION, SELECTION_MANIFEST, read_selection, write_selection
from sftcore.errors import UserInputError
from sftcore.fsio import write_json

ROWS = [{"id": str(number), "level": number} for number in range(4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_selection(tmp_path, ROWS)
    return tmp_path


def test_a_selection_cut_at_any_byte_is_refused_and_written_again(run):
    whole = (run / SELECTION).read_bytes()
    at_line_ends = 0
    for cut in range(len(whole)):
        (run / SELECTION).write_bytes(whole[:cut])
        with pytest.raises(UserInputError, match=rf"{SELECTION}: ") as refused:
            read_selection(run)
        if whole[:cut].endswith(b"\n"):
            at_line_ends += 1
            message = str(refused.value)
            assert f"got: {at_line_ends}, where {SELECTION_MANIFEST} says 4" in message
            assert "select again: sftcore prepare RECIPE" in message
    assert at_line_ends == 3, "the cuts that nothing but the record shows"
    write_selection(run, ROWS)
    assert read_selection(run) == ROWS and (run / SELECTION).read_bytes() == whole


def test_rows_that_were_changed_or_added_are_refused(run):
    text = (run / SELECTION).read_text()
    (run / SELECTION).write_text(text.replace('"3"', '"7"'))
    with pytest.raises(UserInputError, match=r"selection\.jsonl: has changed since it was written"):
        read_selection(run)
    (run / SELECTION).write_text(text + text)
    with pytest.raises(UserInputError, match=r"(?s)rows are missing, or too many.*got: 8, where"):
        read_selection(run)
    (run / SELECTION_MANIFEST).write_text("{}")
    with pytest.raises(UserInputError, match=r"selection\.manifest\.json: lacks num_rows, sha256"):
        read_selection(run)


def test_a_selection_of_an_earlier_version_is_read_and_gets_its_record(run):
    before = (run / SELECTION).read_bytes()
    record = (run / SELECTION_MANIFEST).read_bytes()
    (run / SELECTION_MANIFEST).unlink()
    assert read_selection(run) == ROWS
    write_selection(run, ROWS)
    assert (run / SELECTION_MANIFEST).read_bytes() == record and (run / SELECTION).read_bytes() == before


def test_the_same_rows_are_not_written_again_and_others_are(run):
    inode = (run / SELECTION).stat().st_ino
    write_selection(run, ROWS)
    assert (run / SELECTION).stat().st_ino == inode
    write_json(run / SELECTION_MANIFEST, {"num_rows": 4, "sha256": "0"})
    write_selection(run, ROWS[:3])
    assert read_selection(run) == ROWS[:3]
    assert json.loads((run / SELECTION_MANIFEST).read_text())["num_rows"] == 3
