"""Many processes, kills, shards of a cluster: always the store that one process would have written."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sftcore.data.prepare as prepare_module
import sftcore.data.workers as workers_module
from sftcore.config import Recipe, Source
from sftcore.data.digests import KnownDigests
from sftcore.data.parts import part_name
from sftcore.data.prepare import prepare_shard, prepare_store
from sftcore.data.records import read_source, span_records
from sftcore.data.store import TokenStore
from sftcore.data.units import Unit, cut_sources, share_of_job
from sftcore.errors import SftError, UserInputError
from sftcore.settings import LabelWords
from sftcore.shares import Share

NUM_ROWS = 3000
LINES = st.sampled_from(
    [b"", b"nope", b"1\xff\xfe", b"\r", b'{"a": 1}', b'"' + b"x" * 300 + b'"', "\ufeff{}".encode(), b"[1]"]
)


def facts(n: int) -> list[dict]:
    rows = [
        {"relation": "P1", "subject": f"S{i}", "answers": ["Rome"], "question": f"Where is S{i} of {i % 7}?"}
        for i in range(n)
    ]
    rows[10] = rows[2500 % n]  # a copy far away
    rows[20] = {"relation": "P1"}
    rows[30] |= {"id": "a/x:5"}
    return rows


@pytest.fixture
def recipe(write, monkeypatch) -> Recipe:
    """Three files in two sources; parts of 20 kB instead of 1 MB, a pool from the first byte on."""
    monkeypatch.setattr("sftcore.data.units.PART_BYTES", 20_000)
    monkeypatch.setattr(cut_sources, "__defaults__", (20_000,))
    monkeypatch.setattr(workers_module, "POOL_BYTES", 0)
    write("a/x.jsonl", facts(NUM_ROWS))
    write("b/x.jsonl.gz", facts(40)[30:])
    test = write("test.jsonl", facts(NUM_ROWS)[100:120])
    base = test.parent
    sources = [{"format": "facts", "path": str(base / name)} for name in ("a/*.jsonl", "b/*.gz")]
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": sources, "test": [{"format": "facts", "path": str(test)}]},
            "batch": {"samples_per_step": 4},
        }
    )


def content(store: TokenStore) -> list:
    return [(s.id, s.file, s.row, s.input_ids.tolist(), s.labels.tolist()) for s in store]


def counts(store: TokenStore) -> dict:
    keys = (
        "num_rows_read",
        "num_samples",
        "num_rejected",
        "rejected_by_reason",
        "altered_by_reason",
        "sources",
    )
    return {key: store.manifest[key] for key in keys}


def test_many_workers_write_what_one_writes(recipe, bpe, tmp_path, monkeypatch):
    one = prepare_store(recipe, bpe, cache_root=tmp_path / "one", num_workers=1)
    many = prepare_store(recipe, bpe, cache_root=tmp_path / "many", num_workers=3)
    monkeypatch.setattr(cut_sources, "__defaults__", (2**30,))
    whole = prepare_store(recipe, bpe, cache_root=tmp_path / "whole", num_workers=1)
    assert len(many.manifest["parts"]) > 10 and len(whole.manifest["parts"]) == 2
    assert content(one) == content(many) == content(whole)
    assert counts(one) == counts(many) == counts(whole)
    assert counts(one)["rejected_by_reason"] == {"duplicate_id": 2, "leak": 20, "missing_field": 1}
    assert counts(one)["altered_by_reason"]["duplicate_kept"] == 10  # 1 of the first file, 9 of the second
    rows = [json.loads(x) for x in (many.folder / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["kind"] == "rejected" for row in rows) == many.manifest["num_rejected"]
    assert many.sources.tolist() == sorted(many.sources.tolist()) and set(many.sources.tolist()) == {0, 1}


@given(st.lists(LINES, max_size=60), st.integers(1, 200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_spans_of_a_file_hold_each_row_once(tmp_path_factory, lines, part_bytes, ends):
    path = tmp_path_factory.mktemp("f") / "f.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    source = Source(format="jsonl", path=str(path))
    options = {"split": "train", "labels": LabelWords(), "prefix": "f"}
    whole = list(span_records(source, path, **options))
    units = cut_sources([source], LabelWords(), part_bytes)
    cut = [row for unit in units for row in span_records(source, path, span=unit.span, **options)]
    assert cut == whole


def test_spans_of_a_table_share_the_layout_of_its_first_line(write):
    rows = "".join(f"{i % 2}\tb{i}\ta{i}\n" for i in range(50))
    path = write("p.tsv", "label\tsentence2\tsentence1\n" + rows)
    source = Source(format="pairs", path=str(path))
    whole = list(read_source(source, split="train", labels=LabelWords()))
    units = cut_sources([source], LabelWords(), 40)
    cut = [
        row
        for unit in units
        for row in span_records(source, path, span=unit.span, split="train", labels=LabelWords(), prefix="p")
    ]
    assert len(units) > 5 and cut == whole and len(whole) == 50


def _prepare(recipe: Recipe, tokenizer, cache: Path) -> None:
    prepare_store(recipe, tokenizer, cache_root=cache, num_workers=2)


def test_a_killed_prepare_goes_on_with_what_is_missing(recipe, bpe, tmp_path, monkeypatch):
    wanted = content(prepare_store(recipe, bpe, cache_root=tmp_path / "whole", num_workers=1))
    cache = tmp_path / "killed"
    slow = workers_module.Workshop.write
    monkeypatch.setattr(
        workers_module.Workshop, "write", lambda self, unit: (slow(self, unit), time.sleep(0.05))[0]
    )
    process = multiprocessing.get_context("fork").Process(target=_prepare, args=(recipe, bpe, cache))
    process.start()
    while len(list(cache.glob("*.parts/part-*"))) < 4:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (parts,) = cache.glob("*.parts")
    leftover = parts / f".{part_name(9)}.dead.tmp"
    leftover.mkdir(exist_ok=True)
    written: list[int] = []
    monkeypatch.setattr(
        workers_module.Workshop,
        "write",
        lambda self, unit: (written.append(unit.number), slow(self, unit))[1],
    )
    done = {int(p.name[-5:]) for p in parts.glob("part-*")}
    store = prepare_store(recipe, bpe, cache_root=cache, num_workers=1)
    total = len(store.manifest["parts"])
    assert len(done) >= 4 and 0 < len(written) <= total - 4
    assert not set(written) & done
    assert content(store) == wanted
    assert [p for p in store.folder.iterdir() if p.name.startswith(".")] == []
    assert not parts.exists()


def test_jobs_of_an_array_and_a_merge_that_only_writes_the_manifest(recipe, bpe, tmp_path, monkeypatch):
    wanted = prepare_store(recipe, bpe, cache_root=tmp_path / "whole", num_workers=1)
    cache = tmp_path / "array"
    shares = []
    for job in (2, 0):
        shares.append(prepare_shard(recipe, bpe, Share(job, 3), cache_root=cache, num_workers=1))
    with pytest.raises(UserInputError, match="parts are missing(.|\n)*--shard i/N"):
        prepare_store(recipe, bpe, cache_root=cache, merge_only=True)
    shares.append(prepare_shard(recipe, bpe, Share(1, 3), cache_root=cache, num_workers=2))
    assert sum(mine for mine, _ in shares) == shares[0][1] == len(wanted.manifest["parts"])
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.parts/part-*/*")}
    monkeypatch.setattr(workers_module.Workshop, "write", None)  # the merge encodes nothing
    store = prepare_store(recipe, bpe, cache_root=cache, merge_only=True)
    assert content(store) == content(wanted) and counts(store) == counts(wanted)
    after = {p.relative_to(store.folder): p.stat().st_mtime_ns for p in store.folder.glob("part-*/*")}
    assert sorted(before.values()) == sorted(after.values())
    assert prepare_shard(recipe, bpe, Share(0, 3), cache_root=cache)[0] == shares[1][0]


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 6))
def test_shares_of_jobs_are_complete_and_even(sizes, num_jobs):
    units = [
        Unit(number=i, source=0, file=Path("f"), span=None, limit=None, num_bytes=size)
        for i, size in enumerate(sizes)
    ]
    shares = [share_of_job(units, Share(job, num_jobs)) for job in range(num_jobs)]
    assert sorted(unit.number for share in shares for unit in share) == list(range(len(units)))
    loads = [sum(unit.num_bytes + 1 for unit in share) for share in shares]
    assert max(loads) - min(loads) <= max([0, *sizes]) + 1


def test_a_killed_worker_is_an_error_not_a_hang(recipe, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module.Workshop, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SftError, match="worker process was killed(.|\n)*--workers"):
        prepare_store(recipe, bpe, cache_root=tmp_path / "s", num_workers=2)


def test_all_unusable_files_are_named_at_once(recipe, bpe, tmp_path, write):
    write("a/empty.jsonl", "")
    write("a/bad.jsonl", "nope\n")
    cut_off = write("b/cut.jsonl.gz", facts(40))
    cut_off.write_bytes(cut_off.read_bytes()[:-20])
    write("test.jsonl", "{}\n")
    with pytest.raises(UserInputError) as caught:
        prepare_store(recipe, bpe, cache_root=tmp_path / "s", num_workers=2)
    found = {(Path(p.where).name, p.what.split(":")[0]) for p in caught.value.problems}
    assert found == {
        ("empty.jsonl", "the file holds no rows"),
        ("bad.jsonl", "no usable row"),
        ("cut.jsonl.gz", "damaged or cut-off gzip file"),
        ("test.jsonl", "no usable row"),
    }
    assert not list((tmp_path / "s").glob("*/manifest.json"))


def test_ready_stores_are_not_read_again(recipe, bpe, tmp_path, monkeypatch):
    """Checksums are remembered once files have settled, and forgotten when one is written to."""
    monkeypatch.setattr("sftcore.data.digests.SETTLED_NANOSECONDS", 10**7)
    old = time.time() - 10
    store = prepare_store(recipe, bpe, cache_root=tmp_path / "s", num_workers=1)
    sources = [f for f in tmp_path.rglob("*.jsonl*") if "s/" not in str(f.relative_to(tmp_path))]
    for path in [*store.described_files(), *sources]:
        os.utime(path, (old, old))
    time.sleep(0.05)
    prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    hashed = []
    monkeypatch.setattr("sftcore.data.digests.sha256_of_file", lambda path: hashed.append(path) or "0")
    prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    assert hashed == []
    victim = store.folder / part_name(0) / "labels.bin"
    victim.write_bytes(victim.read_bytes())
    monkeypatch.setattr(prepare_module, "_build", lambda *_, **__: None)
    with pytest.raises(UserInputError):
        prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    assert set(hashed) == {victim}


def test_what_was_written_here_is_not_read_again_and_what_others_wrote_is(recipe, bpe, tmp_path, monkeypatch):
    monkeypatch.setattr("sftcore.data.digests.SETTLED_NANOSECONDS", -(10**9))  # nothing is too young
    store = prepare_store(recipe, bpe, cache_root=tmp_path / "s", num_workers=1)
    files = store.described_files()
    hashed = []
    monkeypatch.setattr("sftcore.data.digests.sha256_of_file", lambda path: hashed.append(path))
    known = KnownDigests(tmp_path / "s" / ".digests.json")
    assert [known.sha256(file) for file in files] == [about["sha256"] for about in files.values()]
    assert hashed == []
    others = tmp_path / "others"
    others.write_text("")
    known.learn({others: "0"}, since=others.stat().st_mtime_ns + 1)
    known.sha256(others)
    assert hashed == [others]


def test_a_file_edited_in_place_is_read_again_though_size_and_time_are_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr("sftcore.data.digests.SETTLED_NANOSECONDS", 0)
    file = tmp_path / "a.jsonl"
    known = KnownDigests(tmp_path / "digests.json")
    digests = []
    for text in ("old", "new"):
        file.write_text(text)
        os.utime(file, ns=(10**18, 10**18))
        time.sleep(0.05)  # more than a tick of the file system's clock
        digests.append(known.sha256(file))
    assert digests == [hashlib.sha256(text).hexdigest() for text in (b"old", b"new")]
