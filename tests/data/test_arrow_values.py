"""One bad value costs its row, however deep; columns that nobody asked for are not decoded."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable

from sftcore.data.arrow_values import Unreadable, python_rows
from sftcore.data.contents import Chat, Completion
from sftcore.data.ledger import Change, Reason
from sftcore.errors import UserInputError

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
GOOD, BAD = b"yo", b"caf\xe9"


def texts(*values):
    """Text that need not be UTF-8, as other writers leave it."""
    return pa.array(values, pa.binary()).view(pa.string())


def chats(kind):
    """Three chats; the second has an answer that is not UTF-8."""
    roles = pa.array(["user", "assistant"] * 3)
    contents = texts(*[b"Hi", GOOD, b"Hi", BAD, b"Hi", GOOD])
    if kind == "dictionary":
        words = texts(b"Hi", GOOD, BAD)
        contents = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 2, 0, 1]), words)
        roles = roles.dictionary_encode()
    if kind == "map":
        pairs = [x for i in range(6) for x in ("role", "content")]
        keys = pa.array(pairs)
        values = texts(*[x for i in range(6) for x in (roles[i].as_py().encode(), [GOOD, BAD][i == 3])])
        turns = pa.MapArray.from_arrays(pa.array(range(0, 13, 2), pa.int32()), keys, values)
    else:
        turns = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(turns, 2)
    array = pa.LargeListArray if kind == "large" else pa.ListArray
    offsets = pa.array([0, 2, 4, 6], pa.int64() if kind == "large" else pa.int32())
    return array.from_arrays(offsets, turns)


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "dictionary", "map"])
def test_a_bad_text_in_nested_columns_costs_its_row(read, tmp_path, kind):
    pq.write_table(pa.table({"messages": chats(kind)}), tmp_path / "a.parquet", store_schema=True)
    records, (rejection,), _ = read("jsonl", tmp_path / "a.parquet")
    assert [record.row for record in records] == [1, 3] and isinstance(records[0].content, Chat)
    assert (rejection.row, rejection.reason) == (2, Reason.UNDECODABLE_BYTES)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_bad_text_in_a_plain_column_costs_its_row(read, tmp_path, kind):
    prompts = texts(b"a", BAD, b"c")
    if kind == pa.large_string():
        prompts = pa.array([b"a", BAD, b"c"], pa.large_binary()).view(kind)
    if pa.types.is_dictionary(kind):
        prompts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), prompts)
    table = pa.table({"prompt": prompts, "completion": pa.array(["x"] * 3)})
    pq.write_table(table, tmp_path / "a.parquet")
    records, (rejection,), _ = read("jsonl", tmp_path / "a.parquet")
    assert [r.content.prompt for r in records] == ["a", "c"]
    assert (rejection.row, rejection.reason) == (2, Reason.UNDECODABLE_BYTES)


def test_a_day_that_python_has_not_costs_its_row(read, tmp_path):
    far = pa.array([0, 5 * 10**6 * 86400 * 10**6, 0], pa.int64()).view(pa.timestamp("us"))
    rows = {"prompt": pa.array(["a", "b", "c"]), "completion": far}
    assert [type(row["completion"]) is Unreadable for row in python_rows(pa.table(rows))] == [0, 1, 0]
    rows |= {"completion": pa.array(["x"] * 3), "note": far}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    records, rejections, _ = read("jsonl", tmp_path / "a.parquet", columns={"ignore": ["note"]})
    assert len(records) == 3 and rejections == []
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table(rows), path)
    assert {r.reason for r in read_all(read, path)} == {Reason.UNKNOWN_KEY}


def read_all(read, path):
    """Rejections of a file without a usable row."""
    from sftcore.config import Source
    from sftcore.data.records import span_records
    from sftcore.settings import LabelWords

    source = Source(format="jsonl", path=str(path))
    return list(span_records(source, path, split="train", labels=LabelWords(), prefix="r"))


@pytest.mark.parametrize("format", [None, "numpy", "pandas", "torch"])
def test_only_columns_that_are_read_are_decoded(read, tmp_path, format):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "audio": Audio(),
            "prompt_id": Value("string"),
        }
    )
    table = pa.table(
        {
            "messages": pa.array([turns] * 3),
            "audio": pa.array(
                [{"bytes": b"no sound", "path": None}] * 3,
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "prompt_id": pa.array(["a"] * 3),
        }
    )
    dataset = Dataset(InMemoryTable(table), info=DatasetInfo(features=features))
    folder = tmp_path / "ds"
    dataset.with_format(format).save_to_disk(folder)
    records, rejections, ledger = read("jsonl", folder)
    assert len(records) == 3 and rejections == []
    assert ledger.altered_by_reason == {Change.COLUMN_LEFT_OUT: 4}  # the sounds, and the id of each row


def test_texts_of_a_data_set_are_the_same_in_every_format(read, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "a"} for i in range(3)]
    for format in (None, "numpy", "pandas", "arrow"):
        folder = tmp_path / str(format)
        Dataset.from_list(rows).with_format(format).save_to_disk(folder)
        assert [r.content for r in read("jsonl", folder)[0]] == [Completion(**row) for row in rows]


def test_pictures_in_a_list_are_part_of_the_prompt(read, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]
    pictures = pa.array([[{"bytes": b"x", "path": None}], []])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": pa.array([turns] * 2), "images": pictures}), path)
    records, (rejection,), _ = read("jsonl", path)
    assert len(records) == 1 and rejection.detail == "a row with 'images', which is not read"


def test_two_columns_of_one_name_are_refused(read, tmp_path):
    names = ["prompt", "prompt", "completion"]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserInputError, match="two columns are named 'prompt'"):
        read("jsonl", tmp_path / "a.parquet")
