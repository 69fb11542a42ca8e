"""Which columns hold a pair, and is the first line a header?"""

from __future__ import annotations

import pytest

from sftcore.data.ledger import Change, Reason
from sftcore.data.rows import RawRow
from sftcore.data.tables import pair_rows
from sftcore.errors import UserInputError
from sftcore.sources import Columns

PAIR = {"a": "x", "b": "y", "label": "1"}
NAMED = Columns()
NUMBERED = Columns(a=0, b=1, label=2)


@pytest.fixture
def rows():
    def read(path, columns=NAMED):
        notes = []
        found = list(pair_rows(path, columns, is_label=lambda t: t in ("0", "1"), note=notes.append))
        return [(r.number, r.value) if isinstance(r, RawRow) else (r.row, r.reason) for r in found], notes

    return read


def test_header_names_columns_in_any_order(write, rows):
    found, notes = rows(write("p.tsv", "id\tlabel\tsentence2\tsentence1\n9\t1\ty\tx\n"))
    assert (found, notes) == ([(1, PAIR | {"other columns": {"id": "9"}})], [])


def test_lcqmc_with_and_without_header_take_the_same_recipe(write, rows):
    columns = Columns(a="text_a", b="text_b", label="label")
    with_header, notes = rows(write("p.tsv", "text_a\ttext_b\tlabel\nx\ty\t1\n"), columns)
    assert notes == []
    without, notes = rows(write("q.tsv", "x\ty\t1\n"), columns)
    assert with_header == without == [(1, PAIR)]
    assert [note.change for note in notes] == [Change.HEADER_ABSENT]


def test_bq_csv_with_mark_and_quotes(write, rows):
    found, notes = rows(write("p.csv", '\ufeffsentence1,sentence2,label\r\n"x","y",1\r\n"a, b",c,0\r\n'))
    assert found == [(1, PAIR), (2, {"a": "a, b", "b": "c", "label": "0"})]
    assert [note.change for note in notes] == [Change.BYTE_ORDER_MARK]


@pytest.mark.parametrize(
    ("first", "assumed", "number"),
    [("text_a\ttext_b\tlabel", True, 1), ("x\ty\t7", False, 2), ("x\ty\t1", False, 2)],
)
def test_numbered_columns_take_a_first_line_without_label_for_a_header(write, rows, first, assumed, number):
    found, notes = rows(write("p.tsv", f"{first}\nx\ty\t1\n"), NUMBERED)
    assert found[-1] == (number, PAIR)
    assert [note.change for note in notes] == [Change.HEADER_ASSUMED] * assumed


def test_a_stray_tab_rejects_its_row(write, rows):
    found, _ = rows(write("p.tsv", "x\ty\t1\nx\tz\ty\t1\nx\ty\nx\ty\t1\n"), NUMBERED)
    assert found == [(1, PAIR), (2, Reason.WRONG_FIELD_COUNT), (3, Reason.WRONG_FIELD_COUNT), (4, PAIR)]


def test_unparsed_rows_are_numbered_without_the_header(write, rows):
    found, _ = rows(write("p.csv", 'sentence1,sentence2,label\nx,"y,1\nx,y,1\n'))
    assert found == [(1, Reason.UNREADABLE_LINE), (2, PAIR)]


def test_json_lines(write, rows):
    columns = Columns(a="s1", b="s2", label="same")
    found, _ = rows(write("p.jsonl.gz", [{"id": 3, "s1": "x", "s2": "y", "same": 1, "z": 0}, ["x"]]), columns)
    assert found == [
        (1, {"a": "x", "b": "y", "label": 1, "id": 3, "other columns": {"z": 0}}),
        (2, ["x"]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("p.xlsx", "", NAMED, "pairs are read from .tsv, .txt, .csv, .jsonl"),
        ("p", "", NAMED, "got: no extension"),
        ("p.jsonl", '{"a": 1}\n', NUMBERED, "columns by number need a TSV or CSV"),
        (
            "p.tsv",
            "sentence_1\tsentence2\tlabel\n",
            NAMED,
            "no column 'sentence1'.*\n.*first row.*\n.*did you mean 'sentence_1'",
        ),
        ("p.tsv", "x\ty\t1\n", Columns(a=0, b=1, label=3), "no column 3"),
        ("p.tsv", "x\ty\tz\n", NAMED, "no column 'sentence1'"),
        ("p.csv", '"x,y,1\n', NAMED, "the first line can't be read: unexpected end of data"),
    ],
)
def test_unusable_tables_are_explained(write, rows, name, content, columns, message):
    with pytest.raises(UserInputError, match=message):
        rows(write(name, content), columns)


def test_an_empty_table_has_no_rows(write, rows):
    assert rows(write("p.tsv", "")) == ([], [])
