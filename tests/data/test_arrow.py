"""Parquet files and Hugging Face data sets are read like JSON lines; pair corpora by preset."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import sftcore.data.arrow as arrow_module
from sftcore.config import Recipe, Source
from sftcore.data.arrow import identity_of, open_dataset
from sftcore.data.contents import Completion, Pair
from sftcore.data.ledger import Reason
from sftcore.data.prepare import prepare_store, store_fingerprint
from sftcore.data.records import span_records
from sftcore.data.units import cut_sources
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.settings import LabelWords

ROWS = [{"prompt": f"Q{i}?", "completion": f" A{i}"} for i in range(2500)]


@pytest.fixture
def saved(tmp_path):
    """The same rows as JSON lines, Parquet (of 25 row groups) and a data set folder."""
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "r.parquet", row_group_size=100)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "r")
    return tmp_path


def test_parquet_and_data_sets_hold_the_same_records(saved, read):
    expected = [(r.id, r.row, r.content) for r in read("jsonl", saved / "r.jsonl")[0]]
    assert len(expected) == 2500 and expected[7][2] == Completion(prompt="Q7?", completion=" A7")
    for name in ("r.parquet", "r"):
        assert [(r.id, r.row, r.content) for r in read("jsonl", saved / name)[0]] == expected


@pytest.mark.parametrize("name", ["r.parquet", "r"])
def test_spans_hold_each_row_once(saved, name):
    source = Source(format="jsonl", path=str(saved / name))
    units = cut_sources([source], LabelWords(), 10_000)
    options = {"split": "train", "labels": LabelWords(), "prefix": "r"}
    cut = [row for u in units for row in span_records(source, u.file, span=u.span, **options)]
    assert len(units) > 3 and cut == list(span_records(source, saved / name, **options))


def test_a_store_from_a_data_set_and_its_fingerprint(saved, bpe, tmp_path):
    def recipe(name: str) -> Recipe:
        return Recipe.model_validate(
            {
                "model": {"path": "m"},
                "data": {"train": [{"format": "jsonl", "path": str(saved / name)}]},
                "batch": {"samples_per_step": 4},
            }
        )

    store = prepare_store(recipe("r"), bpe, cache_root=tmp_path / "s")
    assert len(store) == 2500
    assert store_fingerprint(recipe("r"), bpe) == store.fingerprint
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "again" / "r")
    source = Source(format="jsonl", path=str(tmp_path / "again" / "r"))
    assert identity_of(source, tmp_path / "again" / "r") == identity_of(source, saved / "r")
    open_dataset.cache_clear()
    Dataset.from_list(ROWS[:-1]).save_to_disk(saved / "r")
    assert store_fingerprint(recipe("r"), bpe) != store.fingerprint


def test_odd_values_are_rejections(tmp_path, read):
    rows = pa.table({"prompt": ["a", None, "c"], "completion": pa.array([b"x", b"y", b"z"])})
    pq.write_table(rows, tmp_path / "r.parquet")
    with pytest.raises(
        UserInputError, match="r.parquet: no usable row(.|\n)*'completion' must be text, not bytes"
    ):
        read("jsonl", tmp_path / "r.parquet")


def test_bytes_that_are_no_text_cost_only_their_row(tmp_path, read):
    texts = pa.array([b"a", b"\xff\xfe", b"c"])
    broken = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"prompt": broken, "completion": ["x", "y", "z"]}), tmp_path / "r.PARQUET")
    records, rejections, _ = read("jsonl", tmp_path / "r.PARQUET")
    assert [record.row for record in records] == [1, 3]
    assert [(r.row, r.reason) for r in rejections] == [(2, Reason.UNDECODABLE_BYTES)]


def test_unusable_files_and_folders_are_named(saved, read):
    (saved / "bad.parquet").write_bytes(b"nope")
    whole = (saved / "r.parquet").read_bytes()
    (saved / "cut.parquet").write_bytes(whole[:-100])
    flipped = bytearray(whole)
    flipped[40:400] = b"\xff" * 360
    (saved / "flipped.parquet").write_bytes(bytes(flipped))
    DatasetDict({"train": Dataset.from_list(ROWS[:2])}).save_to_disk(saved / "splits")
    (saved / "empty").mkdir()
    for name, message in (
        ("bad.parquet", "not a Parquet file"),
        ("cut.parquet", "not a Parquet file"),
        ("flipped.parquet", "damaged Parquet file"),
        ("splits", "several splits(.|\n)*splits/train"),
        ("empty", "no data set in this folder(.|\n)*save_to_disk"),
    ):
        with pytest.raises(UserInputError, match=f"{name}: .*{message}"):
            read("jsonl", saved / name)


def test_data_sets_by_name(monkeypatch, read, saved):
    asked = []

    def load(name, subset, split, keep_in_memory):
        assert not keep_in_memory
        asked.append((name, subset, split))
        return Dataset.load_from_disk(str(saved / "r"))

    monkeypatch.setattr("datasets.load_dataset", load)
    arrow_module.open_dataset.cache_clear()
    records, _, _ = read("jsonl", "hub:org/set", subset="main", split="train")
    assert len(records) == 2500 and records[0].id == "set:1" and asked == [("org/set", "main", "train")]
    source = Source(format="jsonl", path="hub:org/set", split="train")
    assert "2500 rows" in identity_of(source, arrow_module.Path("hub:org/set"))


def test_slices_of_a_data_set_are_told_apart_by_their_fingerprints(saved, read, tmp_path, bpe, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 10**9)
    (tmp_path / "set").mkdir()
    (saved / "r.jsonl").rename(tmp_path / "set" / "train.jsonl")
    prints, prompts = set(), []
    for split in ("train[:3]", "train[3:6]", "train[:3]"):
        open_dataset.cache_clear()
        source = {"format": "jsonl", "path": f"hub:{tmp_path}/set", "split": split}
        prompts.append([r.content.prompt for r in read(**source)[0]])
        recipe = {"model": {"path": "m"}, "data": {"train": [source]}, "batch": {"samples_per_step": 4}}
        prints.add(store_fingerprint(Recipe.model_validate(recipe), bpe))
        assert open_dataset(source["path"], None, split).cache_files
    assert prompts == [["Q0?", "Q1?", "Q2?"], ["Q3?", "Q4?", "Q5?"], ["Q0?", "Q1?", "Q2?"]]
    assert len(prints) == 2


def test_a_name_that_cannot_be_reached(read, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(MissingEnvironmentError, match="can't get the data set: no net(.|\n)*save_to_disk"):
        read("jsonl", "hub:org/absent", split="train")

    def unknown(*_, **__):
        raise ValueError("Unknown split")

    monkeypatch.setattr("datasets.load_dataset", unknown)
    with pytest.raises(UserInputError, match="can't load it: Unknown split"):
        read("jsonl", "hub:org/other", split="nope")


@pytest.mark.parametrize(
    ("preset", "name", "content"),
    [
        ("lcqmc", "train.tsv", "text_a\ttext_b\tlabel\nx\ty\t1\n"),
        ("lcqmc", "train.txt", "x\ty\t1\n"),
        ("bq", "train.csv", "\ufeffsentence1,sentence2,label\nx,y,1\n"),
        ("pawsx", "dev.tsv", "id\tsentence1\tsentence2\tlabel\n9\tx\ty\t1\n"),
        ("afqmc", "train.json.jsonl", '{"sentence1": "x", "sentence2": "y", "label": "1"}\n'),
        ("mrpc", "msr.txt", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tx\ty\n"),
        ("qqp", "train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tx\ty\t1\n"),
    ],
)
def test_presets(write, preset, name, content):
    source = Source.model_validate({"preset": preset, "path": str(write(name, content))})
    assert source.format == "pairs" and Source.model_validate(source.model_dump()) == source
    rows = span_records(
        source, arrow_module.Path(source.path), split="train", labels=LabelWords(), prefix="p"
    )
    assert [row.content for row in rows] == [Pair(a="x", b="y", label=1)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"preset": "lcqmc", "format": "facts", "path": "x"},
            "preset lcqmc is a layout of pairs",
        ),
        ({"preset": "nope", "path": "x"}, "'lcqmc', 'bq'"),
        ({"format": "jsonl", "path": "hub:a/b"}, "needs `split`"),
        ({"format": "jsonl", "path": "x", "split": "train"}, "are for `hub:` paths"),
    ],
)
def test_sources_that_make_no_sense(source, message):
    with pytest.raises(ValueError, match=message):
        Source.model_validate(source)
