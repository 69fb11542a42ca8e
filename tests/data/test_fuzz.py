"""Whatever a file holds: samples, ledger entries, or one clear error; rows read = samples + rejects."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, build_bpe

from sftcore.config import Recipe
from sftcore.data.prepare import prepare_store
from sftcore.data.units import cut_sources
from sftcore.errors import UserInputError

TOKENIZER = build_bpe()
TOKENIZER.chat_template = CHATML
TASKS = {"entityquestions": "qa", "facts": "qa", "pairs": "matching", "jsonl": "qa", "chat": "chat"}
NAMES = {
    "entityquestions": ["P19.json", "P19.json.gz"],
    "facts": ["f.jsonl", "f.jsonl.gz", "f.parquet"],
    "pairs": ["p.tsv", "p.csv", "p.jsonl", "p.tsv.gz", "p.csv.gz", "p.parquet", "p.txt"],
    "jsonl": ["c.jsonl", "c.jsonl.gz", "c.parquet"],
    "chat": ["m.jsonl"],
}
ODD_TEXTS = ["", " ", "\0", "\ud800", "\ufeff", "\u2028", '"', "a\tb", "a\nb", "\r", "x" * 9000]
TEXTS = st.sampled_from([*ODD_TEXTS, "<|im_end|>", "北京", "Ann", "Rome", "Where?"]) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=4,
)
JUNK = st.sampled_from([b'"', b"\n", b"\r", b"{", b"\xff", b"\xef\xbb\xbf", b"\0"])
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])
OUTCOMES: Counter[str] = Counter()


def good_row(format: str, i: int) -> dict:
    match format:
        case "entityquestions":
            return {"question": f"Where was S{i}x born?", "answers": ["Rome"]}
        case "facts":
            return {"relation": "P19", "subject": f"S{i}", "answers": ["Rome"]}
        case "pairs":
            return {"sentence1": f"a{i}", "sentence2": "b", "label": i % 2}
        case "chat":
            turns = [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "yo"}]
            return {"messages": turns}
    return {"prompt": f"Q{i}?", "completion": " A"}


@st.composite
def rows_of(draw, format: str) -> list:
    """Rows most of which are good; some have odd values, extra or missing keys, or are no objects."""
    rows: list = [good_row(format, i) for i in range(draw(st.integers(0, 5)))]
    for _ in range(draw(st.integers(0, 3))):
        row = good_row(format, 9)
        key = draw(st.sampled_from([*row, "id"]))
        kind = draw(st.sampled_from(["missing", "odd", "other"]))
        value = draw(VALUES)
        rest = {k: v for k, v in row.items() if k != key}
        odd = {"missing": rest, "odd": row | {key: value}, "other": value}[kind]
        rows.insert(draw(st.integers(0, len(rows))), odd)
    return rows


def dumped(value) -> str:
    """JSON with NaN and lone surrogates as escapes or as they are."""
    return json.dumps(value, ensure_ascii=True)


def table(rows: list, separator: str) -> str:
    """A table with header; cells are not quoted, whatever they hold."""
    cells = [[str(v) for v in row.values()] if isinstance(row, dict) else [str(row)] for row in rows]
    return "\n".join(separator.join(row) for row in [["sentence1", "sentence2", "label"], *cells]) + "\n"


def parquet(rows: list) -> bytes:
    buffer = io.BytesIO()
    try:
        objects = [row for row in rows if isinstance(row, dict)]
        pq.write_table(pa.Table.from_pylist(objects), buffer, row_group_size=2)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        pq.write_table(pa.table({"prompt": ["a"]}), buffer)
    return buffer.getvalue()


@st.composite
def files(draw) -> tuple[str, str, bytes]:
    """A format, a file's name and its bytes, perhaps damaged."""
    format = draw(st.sampled_from(sorted(NAMES)))
    name = draw(st.sampled_from(NAMES[format]))
    rows = draw(rows_of(format))
    if name.endswith(".parquet"):
        data = parquet(rows)
    else:
        if name.removesuffix(".gz").endswith((".tsv", ".txt", ".csv")):
            text = table(rows, "," if ".csv" in name else "\t")
        elif format == "entityquestions":
            text = dumped(rows)
        else:
            text = "".join(dumped(row) + "\n" for row in rows)
        data = text.replace("\n", draw(LINE_ENDS)).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        data = draw(damaged(data))
    if name.endswith(".gz"):
        data = gzip.compress(data)
        data = draw(damaged(data)) if draw(st.booleans()) else data
    return format, name, data


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Cut off, with bytes overwritten, put in or taken out, or with a mark in front."""
    place = draw(st.integers(0, len(data)))
    junk = draw(st.binary(max_size=4) | JUNK)
    start, rest = data[:place], data[place:]
    marked = [b"\xef\xbb\xbf" + data, b"\xff\xfe" + data]
    put_in, written_over = start + junk + rest, start + junk + rest[len(junk) :]
    return draw(st.sampled_from([start, rest, put_in, written_over, *marked, data * 2]))


def num_lines(data: bytes) -> int:
    """Rows of a JSON lines file, counted without the reader."""
    lines = [line.decode("utf-8", "surrogateescape").removeprefix("\ufeff") for line in data.split(b"\n")]
    return sum(bool(line.strip()) for line in lines)


def check(file: tuple[str, str, bytes]) -> None:
    format, name, data = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        recipe = Recipe.model_validate(
            {
                "model": {"path": "m"},
                "task": TASKS[format],
                "data": {
                    "train": [{"format": "jsonl" if format == "chat" else format, "path": str(path)}],
                    "max_reject_fraction": 1.0,
                },
                "batch": {"samples_per_step": 4, "capacity": 64},
            }
        )
        try:
            store = prepare_store(recipe, TOKENIZER, cache_root=Path(folder) / "s", num_workers=1)
        except UserInputError as error:
            OUTCOMES["error"] += 1
            assert error.problems and all(p.what for p in error.problems)
            assert not list(Path(folder).glob("s/*/manifest.json"))
            return
        manifest = store.manifest
        OUTCOMES["store with rejects" if manifest["num_rejected"] else "store"] += 1
        assert manifest["num_rows_read"] == len(store) + manifest["num_rejected"]
        entries = [json.loads(x) for x in (store.folder / "ledger.jsonl").read_text().split("\n") if x]
        assert sum(entry["kind"] == "rejected" for entry in entries) == manifest["num_rejected"]
        if name.endswith(".jsonl"):
            assert manifest["num_rows_read"] == num_lines(data)
        assert all((s.labels != -100).sum() == s.num_trained for s in store)


QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@QUICK
@given(files(), st.integers(20, 200))
def test_any_file_ends_in_samples_rejects_or_one_error(file, part_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_sources, "__defaults__", (part_bytes,))
        check(file)


def test_all_kinds_of_outcome_occurred():
    assert len(OUTCOMES) == 3 and min(OUTCOMES.values()) >= 5, OUTCOMES


@pytest.mark.slow
@settings(QUICK, max_examples=2500, derandomize=False)
@given(files(), st.integers(20, 200))
def test_two_thousand_files(file, part_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut_sources, "__defaults__", (part_bytes,))
        check(file)


@pytest.mark.parametrize("overlength", ["reject", "trim_prompt"])
def test_a_line_of_50_megabytes(tmp_path, overlength):
    """It is over-long without being encoded; trimming it encodes only what could fit."""
    rows = [{"prompt": "x y " * 12_500_000, "completion": " A"}, {"prompt": "Q?", "completion": " A"}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {
                "train": [{"format": "jsonl", "path": str(path)}],
                "max_reject_fraction": 1.0,
                "overlength": overlength,
            },
            "batch": {"samples_per_step": 4, "capacity": 64},
        }
    )
    store = prepare_store(recipe, TOKENIZER, cache_root=tmp_path / "s", num_workers=1)
    if overlength == "reject":
        assert store.manifest["rejected_by_reason"] == {"overlength": 1} and len(store) == 1
    else:
        assert store.lengths[0] == 64 and store.manifest["altered_by_reason"]["prompt_trimmed"] == 1


def test_keys_given_twice_cost_the_row_and_are_named(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "Q?", "prompt": "R?", "completion": " A"}\n')
    recipe = Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": [{"format": "jsonl", "path": str(path)}]},
            "batch": {"samples_per_step": 4},
        }
    )
    with pytest.raises(UserInputError, match="the key 'prompt' stands twice"):
        prepare_store(recipe, TOKENIZER, cache_root=tmp_path / "s", num_workers=1)
