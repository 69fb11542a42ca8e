"""The store: what goes in comes out, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sftcore.data.parts as parts_module
from sftcore.data.contents import Completion
from sftcore.data.ledger import Alteration as A
from sftcore.data.ledger import Change, Ledger, Reason, Rejection
from sftcore.data.merge import Part, write_merge
from sftcore.data.parts import part_name, write_part
from sftcore.data.records import Record
from sftcore.data.seam import Encoded
from sftcore.data.store import TokenStore
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.fsio import atomic_folder

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=20)
NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)


def record(id="s", row=1) -> Record:
    content = Completion(prompt=f"{id} {row}", completion="x")
    return Record(id=id, split="train", file="dir/f.jsonl", row=row, content=content)


def encoded(ids, *, num_trained=1) -> Encoded:
    return Encoded(ids=ids, trained=((len(ids) - num_trained, len(ids)),))


def write_store(folder: Path, samples, *, ledger=None, per_part=100) -> None:
    """A store of (Record, Encoded); every `per_part` of them make a part."""
    samples = list(samples)
    with atomic_folder(folder, keep_existing=True) as temporary:
        units = range(0, max(1, len(samples)), per_part)
        for number, start in enumerate(units):
            some = samples[start : start + per_part]
            lookup = {id(record): ids for record, ids in some}
            write_part(
                temporary / part_name(number),
                [record for record, _ in some],
                lambda records, lookup=lookup: [lookup[id(record)] for record in records],
                ledger=Ledger(),
                about={"source": 0, "file": "dir/f.jsonl"},
            )
        folders = [temporary / part_name(number) for number in range(len(units))]
        parts = [Part(folder=f, about=json.loads((f / "part.json").read_text())) for f in folders]
        outcomes = np.zeros(len(samples), np.uint8)
        write_merge(temporary, parts, outcomes, ledger or Ledger(), fingerprint="f00d", sources=["f.jsonl"])


THREE = [
    (record("a"), encoded([5, 6, 7])),
    (record("b", 2), encoded([8, 9])),
    (record("ü"), encoded([1, 2, 3, 4], num_trained=2)),
]


def written(folder: Path, samples=THREE, ledger=None, per_part=100) -> TokenStore:
    write_store(folder, samples, ledger=ledger, per_part=per_part)
    return TokenStore.open(folder, "f00d")


@given(st.lists(st.tuples(IDS, NAMES), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_round_trip_is_bit_equal(tmp_path_factory, rows):
    samples = [(record(name, i), encoded(ids)) for i, (ids, name) in enumerate(rows, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "BATCH_RECORDS", 2)  # several batches
        store = written(tmp_path_factory.mktemp("s") / "store", samples, per_part=5)  # and several parts
    assert len(store) == len(samples) == len(store.ids)
    for i, (got, (want, ids)) in enumerate(zip(store, samples, strict=True)):
        assert (got.id, got.file, got.row, got.num_trained) == (want.id, want.file, want.row, 1)
        assert got.input_ids.tolist() == ids.ids and got.labels.tolist() == ids.labels
        assert (store.lengths[i], store.num_trained[i]) == (len(ids.ids), 1)
    store.verify()


def test_columns_have_the_promised_types_and_layout(tmp_path):
    store = written(tmp_path / "store")
    assert store.lengths.dtype == store.num_trained.dtype == np.int32
    assert store.lengths.tolist() == [3, 2, 4] and store.num_trained.tolist() == [1, 1, 2]
    assert store.ids == ["a", "b", "ü"]
    flat = np.fromfile(tmp_path / "store/part-00000/input_ids.bin", "<i4")
    assert flat.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    labels = np.fromfile(tmp_path / "store/part-00000/labels.bin", "<i4")
    assert labels.tolist() == [-100, 7, -100, 9, -100, -100, 3, 4, -100]
    assert (store[-1].id, store[2].id) == ("ü", "ü")
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"sample {i} of 3"):
            store[i]


@pytest.mark.parametrize("per_part", [1, 2, 100])
def test_the_last_target_of_each_sample_is_its_last_trained_one(tmp_path, per_part):
    """A prompt behind the answer, as in a chat's last turn, has none."""
    ends_early = Encoded(ids=[1, 2, 9, 4, 5], trained=((1, 3),))
    a_class = Encoded(ids=[6, 7], trained=(), label=1)
    samples = [*THREE, (record("d"), ends_early), (record("e"), a_class)]
    store = written(tmp_path / "store", samples, per_part=per_part)
    assert store.last_targets.tolist() == [7, 9, 4, 9, 1]


def test_samples_are_views_of_the_map_and_read_only(tmp_path):
    store = written(tmp_path / "store")
    assert np.shares_memory(store[0].input_ids, store._parts[0].input_ids)
    with pytest.raises(ValueError, match="read-only"):
        store[0].input_ids[0] = 1


def test_an_open_store_keeps_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    store = written(tmp_path / "store", per_part=1)
    assert len(store._parts) == len(THREE) and len(os.listdir("/proc/self/fd")) == before
    assert store[0].input_ids.tolist()


def test_manifest_keeps_the_account(tmp_path):
    ledger = Ledger()
    rows = [1, 2, Rejection(file="f", row=3, reason=Reason.WRONG_TYPE), 4]
    list(ledger.take(rows))
    ledger.alter(A(file="f", row=1, change=Change.SEAM_APART))
    written(tmp_path / "store", ledger=ledger)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert manifest["num_rows_read"] == 4 == manifest["num_samples"] + manifest["num_rejected"]
    assert manifest["rejected_by_reason"] == {"wrong_type": 1}
    assert manifest["altered_by_reason"] == {"seam_apart": 1}
    assert (manifest["num_tokens"], manifest["num_trained_tokens"]) == (9, 4)
    assert (manifest["fingerprint"], manifest["format_version"]) == ("f00d", 2)
    assert set(manifest["created_with"]) == {"numpy", "pyarrow", "tokenizers", "transformers"}
    assert [json.loads(x)["row"] for x in (tmp_path / "store/ledger.jsonl").read_text().splitlines()] == [
        3,
        1,
    ]


def test_a_stale_fingerprint_or_another_format_is_refused(tmp_path):
    written(tmp_path / "store")
    assert TokenStore.open(tmp_path / "store").fingerprint == "f00d"
    with pytest.raises(
        UserInputError, match="stale: data, template(.|\n)*f00d, expected beef(.|\n)*sftcore prepare"
    ):
        TokenStore.open(tmp_path / "store", "beef")
    edit_manifest(tmp_path / "store", format_version=99)
    with pytest.raises(UserInputError, match="store format 99, this is 2"):
        TokenStore.open(tmp_path / "store", "f00d")


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def resize(path: Path, num_bytes: int) -> None:
    with open(path, "r+b") as handle:
        handle.truncate(num_bytes)


@pytest.mark.parametrize("name", ["input_ids.bin", "labels.bin", "rows.arrow"])
def test_truncated_grown_and_missing_columns_are_named(tmp_path, name):
    store = written(tmp_path / "store")
    size = store.manifest["parts"][0]["files"][name]["bytes"]
    for num_bytes in (size - 4, size + 4, 0):
        resize(tmp_path / "store/part-00000" / name, num_bytes)
        with pytest.raises(UserInputError, match=f"{name} has {num_bytes} bytes, not {size}"):
            TokenStore.open(tmp_path / "store", "f00d")
    (tmp_path / "store/part-00000" / name).unlink()
    with pytest.raises(UserInputError, match=f"{name} has 0 bytes, not {size}"):
        TokenStore.open(tmp_path / "store", "f00d")


@pytest.mark.parametrize("name", ["part-00000/input_ids.bin", "part-00000/labels.bin", "ledger.jsonl"])
def test_an_edited_byte_is_found_by_its_checksum(tmp_path, name):
    ledger = Ledger()
    ledger.reject(Rejection(file="f", row=3, reason=Reason.WRONG_TYPE))
    written(tmp_path / "store", ledger=ledger)
    path = tmp_path / "store" / name
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    store = TokenStore.open(tmp_path / "store", "f00d")
    with pytest.raises(UserInputError, match=f"{name} was changed after it was written"):
        store.verify()


def test_an_unreadable_index_is_named(tmp_path):
    written(tmp_path / "store")
    path = tmp_path / "store/part-00000/rows.arrow"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserInputError, match="rows.arrow can't be read"):
        TokenStore.open(tmp_path / "store")


def test_totals_that_do_not_match_are_refused(tmp_path):
    written(tmp_path / "store")
    edit_manifest(tmp_path / "store", num_trained_tokens=5)
    with pytest.raises(
        UserInputError, match="columns and manifest don't match\n.*num_trained_tokens: 4, not 5"
    ):
        TokenStore.open(tmp_path / "store")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no token store here"),
        ("{", "not valid JSON"),
        ("[]", "not that of a token store"),
        ('{"fingerprint": "f00d"}', "not that of a token store"),
    ],
)
def test_a_folder_without_a_proper_manifest_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserInputError, match=message):
        TokenStore.open(tmp_path)


def test_an_error_half_way_leaves_nothing(tmp_path):
    def broken():
        yield THREE[0][0]
        raise UserInputError("enough")

    with pytest.raises(UserInputError, match="enough"):
        write_part(tmp_path / "part", broken(), lambda records: [None], ledger=Ledger(), about={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "victim",
    [
        "input_ids.bin",
        "labels.bin",
        "rows.arrow",
        "ledger.jsonl",
        "part.json",
        "outcome.bin",
        "manifest.json",
    ],
)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, victim):
    """Every file in turn is the one whose write fails."""
    real_open = open
    hits = []

    def failing_open(path, mode="r", *args, **options):
        handle = real_open(path, mode, *args, **options)
        if "w" in mode and victim in str(path):
            hits.append(path)

            def full(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            return Proxy(handle, full)
        return handle

    class Proxy:
        def __init__(self, handle, full):
            self.handle, self.write, self.closed = handle, full, False

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.handle.close()

    ledger = Ledger()
    ledger.reject(Rejection(file="f", row=3, reason=Reason.WRONG_TYPE))
    monkeypatch.setattr("builtins.open", failing_open)
    with pytest.raises(MissingEnvironmentError, match="No space left(.|\n)*free space there"):
        write_store(tmp_path / "store", THREE, ledger=ledger)
    monkeypatch.undo()
    assert hits and list(tmp_path.iterdir()) == []


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        many = [(record(str(i)), encoded(list(range(100)))) for i in range(2000)]
        with pytest.raises(MissingEnvironmentError, match="No space left"):
            write_store(disk / "store", many)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_place_is_explained(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MissingEnvironmentError, match="read-only: choose another folder"):
        write_store(tmp_path / "store", THREE)


def test_the_first_of_two_writers_wins_and_both_read_the_same(tmp_path):
    first = written(tmp_path / "store")
    inode = (tmp_path / "store/manifest.json").stat().st_ino
    second = written(tmp_path / "store")
    assert (tmp_path / "store/manifest.json").stat().st_ino == inode
    assert first.ids == second.ids
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_writing_holds_no_rows_in_memory(tmp_path):
    """Ten times the rows, the same peak (within 20 %); the samples are made on the fly."""

    def peak(num_rows: int) -> int:
        rows = (record("x", i) for i in range(num_rows))
        sample = encoded([1, 2, 3, 4] * 8)
        tracemalloc.start()
        folder = tmp_path / str(num_rows)
        write_part(folder, rows, lambda records: [sample] * len(records), ledger=Ledger(), about={})
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    peak(100)  # imports
    assert peak(22_000) < 1.2 * peak(2_200)
