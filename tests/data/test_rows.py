"""Bytes -> rows: line ends, marks, compression, broken files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.cells import csv_rows, split_rows
from sftcore.data.ledger import Change, Reason, Rejection
from sftcore.data.rows import RawRow, json_line_rows, json_list_rows, json_rows, text_lines
from sftcore.errors import UserInputError

CELLS = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r"), min_size=1, max_size=8
)
TABLES = st.lists(st.tuples(CELLS, CELLS, CELLS).map(list), min_size=1, max_size=6)


def values(rows) -> list:
    return [row.value if isinstance(row, RawRow) else row.reason for row in rows]


NUMBERS = [7, 2**63, -(2**63) - 1, 2**64, 10**400]


def test_only_newlines_end_a_line(write):
    path = write("a.tsv", "a\u2028b\x85c\x0bd\x0ce\rf\n2\r\n3\r\r\n")
    assert list(text_lines(path)) == ["a\u2028b\x85c\x0bd\x0ce\rf", "2", "3"]


def test_byte_order_marks_are_taken_off_and_noted(write):
    notes = []
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n\xef\xbb\xbf{"a": 3}\n')
    assert values(json_line_rows(path, notes.append)) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [(note.row, note.change) for note in notes] == [
        (1, Change.BYTE_ORDER_MARK),
        (3, Change.BYTE_ORDER_MARK),
    ]


def test_bad_json_lines_cost_only_themselves(write):
    bad = "[" * 100_000
    path = write("a.jsonl", f'{{"a": 1}}\n{{"a": \n\n  \n{bad}\n{{"a": 2}}\r{{"a": 3}}\n{{"a": 4}}')
    rows = list(json_line_rows(path))
    assert values(rows) == [{"a": 1}, *[Reason.UNREADABLE_LINE] * 3, {"a": 4}]
    assert [row.row for row in rows if isinstance(row, Rejection)] == [2, 5, 6]
    assert rows[-1].number == 7


def test_undecodable_json_line_says_so(write):
    path = write("a.jsonl", '{"a": "好"}\n'.encode() + '{"a": "乗"}\n'.encode("gbk"))
    assert values(json_line_rows(path)) == [{"a": "好"}, Reason.UNDECODABLE_BYTES]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_list(write, name):
    path = write(name, b"\xef\xbb\xbf" + json.dumps([1, {"b": "é"}], indent=1).encode())
    assert [(row.number, row.value) for row in json_list_rows(path)] == [(1, 1), (2, {"b": "é"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "must hold one JSON list.*\n.*got: dict"),
        ("[1, 2", "not valid JSON: Expecting ',' delimiter: line 1 column 6"),
        ("[" * 100_000, "not valid JSON"),
        ("[1" + "0" * 5000 + "]", "not valid JSON"),
    ],
)
def test_json_that_is_not_a_list(write, content, message):
    with pytest.raises(UserInputError, match=message) as caught:
        list(json_list_rows(write("a.json", content)))
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize("size", [10, 40, -1])
def test_cut_off_gzip_is_named(write, size):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    path = write("a.bin", b"")
    path = path.rename(path.with_name("a.jsonl.gz"))
    path.write_bytes(whole[:size])
    with pytest.raises(UserInputError, match="a.jsonl.gz: damaged or cut-off gzip file"):
        list(json_line_rows(path))


def test_gzip_with_a_flipped_bit_or_of_plain_text_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"a": 1}\n' * 1000))
    whole[len(whole) // 2] ^= 0xFF
    for data in (bytes(whole), b'{"a": 1}\n'):
        path.write_bytes(data)
        with pytest.raises(UserInputError, match="damaged or cut-off gzip file"):
            list(json_line_rows(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}'.encode("utf-16"), "this is UTF-16 text.*\n.*iconv"),
        ('{"a": 1}'.encode("utf-16-be").join([b"\xfe\xff", b""]), "this is UTF-16 text"),
        (gzip.compress(b"{}", mtime=0), "gzip data under a name without .gz"),
        ('{"a": 1}'.encode("utf-32"), "this is UTF-32 text.*\n.*iconv"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (lzma.compress(b"{}"), "xz data"),
        (bz2.compress(b"{}"), "bzip2 data"),
        (bytes.fromhex("28b52ffd0400190000"), "zstd data"),
    ],
)
def test_foreign_files_are_named(write, data, message):
    with pytest.raises(UserInputError, match=message):
        list(text_lines(write("a.jsonl", data)))


def test_a_folder_or_a_missing_file_is_named(tmp_path):
    for path, message in ((tmp_path, "can't be read: Is a directory"), (tmp_path / "no", "No such file")):
        with pytest.raises(UserInputError, match=message):
            list(text_lines(path))


def test_quotes_in_tsv_are_text(write):
    path = write("a.tsv", 'he said "hi"\t"b\t1\n"x"\ty\t0\n')
    assert values(split_rows(path, "\t")) == [['he said "hi"', '"b', "1"], ['"x"', "y", "0"]]


def test_quotes_in_csv_are_quotes(write):
    path = write("a.csv", '"a,1","say ""hi""\nthere",1\nb,c,0\n')
    assert values(csv_rows(path)) == [["a,1", 'say "hi"\nthere', "1"], ["b", "c", "0"]]


def test_a_stray_quote_costs_its_own_row_only(write):
    good = "".join(f"a{i},b{i},1\n" for i in range(5))
    rows = list(csv_rows(write("a.csv", f'{good}x,"never closed,1\n{good}')))
    assert [type(row) for row in rows] == [RawRow] * 5 + [Rejection] + [RawRow] * 5
    assert (rows[5].row, rows[5].reason) == (6, Reason.UNREADABLE_LINE)
    assert "never closed" in rows[5].excerpt
    assert [row.number for row in rows[6:]] == [7, 8, 9, 10, 11]


def test_two_stray_quotes_cost_two_rows(write):
    rows = list(csv_rows(write("a.csv", 'a,b,1\nx,"y,1\nc,d,0\nz,"w,0\ne,f,1\n')))
    assert values(rows) == [
        ["a", "b", "1"],
        Reason.UNREADABLE_LINE,
        ["c", "d", "0"],
        Reason.UNREADABLE_LINE,
        ["e", "f", "1"],
    ]


def test_lone_carriage_returns_in_csv_are_rejected_not_guessed(write):
    rows = values(csv_rows(write("a.csv", "a,b,1\nc\rx,d,0\n\ne,f,1\n")))
    assert rows == [["a", "b", "1"], Reason.UNREADABLE_LINE, ["e", "f", "1"]]


@given(TABLES)
def test_csv_round_trip(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text = io.StringIO()
    csv.writer(text).writerows(table)
    path.write_bytes(text.getvalue().encode())
    assert values(csv_rows(path)) == [
        [c.lstrip("\ufeff") if i == j == 0 else c for j, c in enumerate(row)] for i, row in enumerate(table)
    ]


def test_numbers_of_any_length_stay_whole(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(f'{{"id": {number}}}' for number in NUMBERS))
    assert [row.value["id"] for row in json_line_rows(path)] == NUMBERS


def archive(*names) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive("[Content_Types].xml", "xl/workbook.xml"), "this is an Excel workbook.*\n.*as CSV"),
        (archive("word/document.xml"), "this is a Word document"),
        (archive("a.jsonl"), "this is a zip archive.*\n.*unpack it"),
        ('{"a": "x"}\n{"a": "y"}'.encode("utf-16-le"), "UTF-16 or UTF-32 text without a mark.*\n.*iconv"),
        ('{"a": "北京"}\n'.encode("utf-16-be"), "UTF-16 or UTF-32 text without a mark"),
        ('{"a": 1}'.encode("utf-32-le"), "UTF-16 or UTF-32 text without a mark"),
        (bytes(10**5), "it begins with zeros only"),
    ],
)
def test_files_of_other_programs_and_text_without_a_mark_are_named(write, data, message):
    with pytest.raises(UserInputError, match=message):
        list(text_lines(write("a.jsonl", data)))


def test_a_file_of_zeros_is_refused_without_reading_it_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    with pytest.raises(UserInputError, match="zeros only"):
        list(text_lines(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_single_nul_costs_its_row_only(write):
    rows = values(json_line_rows(write("a.jsonl", b'{"a": "long enough", "b": "x\0y"}\n{"a": 1}\n')))
    assert rows == [Reason.UNREADABLE_LINE, {"a": 1}]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_lines_is_read_as_one_and_noted(write, indent):
    notes = []
    path = write("a.jsonl", json.dumps([{"a": 1}, {"a": 2}], indent=indent))
    assert values(json_rows(path, notes.append)) == [{"a": 1}, {"a": 2}]
    assert [note.change for note in notes] == [Change.JSON_LIST]


def test_lines_of_lists_and_damaged_ones_are_still_lines(write):
    assert values(json_rows(write("a.jsonl", "[1]\n[2]\n"))) == [[1], [2]]
    assert values(json_rows(write("b.jsonl", '[{"a"\n{"a": 2}\n'))) == [Reason.UNREADABLE_LINE, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("crème brûlée, naïve café", "latin-1", "WINDOWS-1252"),
        ("乗北京上海", "gb18030", "GB18030"),
        ("Привет, мир", "cp1251", "WINDOWS-1251 or ISO-8859-7"),
        ("Привет, мир", "koi8-r", "KOI8-R"),
        ("Γειά σου Κόσμε", "iso8859-7", "ISO-8859-5 or ISO-8859-7"),
        ("안녕하세요 세계", "euc-kr", "GB18030, BIG5, EUC-JP or EUC-KR"),
    ],
)
def test_undecodable_rows_name_the_encoding_that_they_look_like(write, read, text, encoding, guess):
    line = json.dumps({"prompt": text, "completion": "b"}, ensure_ascii=False).encode(encoding)
    path = write("a.jsonl", b'{"prompt": "a", "completion": "b"}\n' + line)
    (rejection,) = read("jsonl", path)[1]
    assert rejection.reason is Reason.UNDECODABLE_BYTES and f"({guess}?)" in rejection.detail
    place = int(rejection.detail.partition("at its byte ")[2].partition(" ")[0])
    where = line if rejection.detail.startswith("not UTF-8") else text.encode(encoding)
    assert where[place - 1] > 127 and where[: place - 1].isascii()


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt":"a","completion":"b","completion":"c"}',
        '{"prompt" : "a", "completion" : "b", "completion" : "c"}',
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        '{"prompt": "a \\"x\\": y", "completion": "b", "completion": "c"}',
    ],
)
def test_a_key_that_stands_twice_costs_the_row(write, read, line):
    good = '{"prompt": "a \\"x\\": y", "completion": "b"}\n{"prompt" : "a", "completion" : "b"}\n'
    records, (rejection,), _ = read("jsonl", write("twice.jsonl", good + line + "\n"))
    assert len(records) == 2 and rejection.reason is Reason.UNREADABLE_LINE
    assert "stands twice" in rejection.detail
