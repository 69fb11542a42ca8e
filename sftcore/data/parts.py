"""One part of a store: the columns of one unit of work, before anybody has compared it with the others.

In: the rows of a `Unit`, a `Prompter`. Out: a folder with ids, labels, one line a record, its own ledger.
Invariant: a part under its final name is complete (one rename, part.json written last) and depends on its
unit and the recipe only; duplicates, leaks and contradictions are decided later, from the hashes in it.
Trade-off: rows that the comparison will drop are tokenised too (0.3 % of EntityQuestions), and in return a
part needs no other part: any process, on any node, in any order, can write it.

    input_ids.bin  int32 ids of all samples, end to end        |s0 s0 s0|s1 s1|s2 s2 s2 s2|
    labels.bin     int32 targets, likewise                      ^0       ^3    ^5
    rows.arrow     one line a record (`ROWS_SCHEMA`) or sample; its offset is the sum of num_tokens before it
    ledger.jsonl   rows that did not parse, texts that were altered
    part.json      its unit, totals, sizes, checksums
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from sftcore.data.filters.columns import REASONS, hash_earlier, hash_id, hash_row
from sftcore.data.ledger import Change, Ledger, Rejection, printable_path
from sftcore.data.prompts import Refusal
from sftcore.data.records import Record
from sftcore.data.rows import has_surrogates
from sftcore.data.seam import Encoded, flat_ids, flat_labels
from sftcore.fsio import atomic_folder, sha256_of_file, write_json

BATCH_RECORDS = 1024  # encoded and written together; EntityQuestions: 0.3 MB of text
PART_COLUMNS = ("input_ids.bin", "labels.bin", "rows.arrow", "ledger.jsonl")
INT32 = np.dtype("<i4")
CHANGES = tuple(Change)
NO_REFUSAL = -1
ROWS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("id_hash", pa.uint64()),
        ("item_hash", pa.uint64()),
        ("question_hash", pa.uint64()),
        ("text_hash", pa.uint64()),
        ("label", pa.int8()),  # of a pair; -1 for others
        ("num_tokens", pa.int32()),  # 0: no sample
        ("num_trained", pa.int32()),
        ("refusal", pa.int8()),  # position in REASONS, or NO_REFUSAL
        ("detail", pa.string()),  # of the refusal
        ("changes", pa.int32()),  # bit i: CHANGES[i]
        ("earlier_hashes", pa.list_(pa.uint64())),  # of a chat (`hash_earlier`)
        ("prompt_hash", pa.uint64()),  # of a sample's ids before its last answer; 0: no sample
        ("sample_hash", pa.uint64()),  # of all of its ids
    ]
)
Result = Encoded | Refusal | None
Encode = Callable[[Sequence[Record]], Sequence[Result | tuple[Encoded, ...]]]


def part_name(number: int) -> str:
    """Folder of unit `number` in a store."""
    return f"part-{number:05d}"


def write_part(
    folder: Path,
    rows: Iterable[Record | Rejection],
    encode: Encode,
    *,
    ledger: Ledger,
    about: dict[str, Any],
) -> None:
    """Write a part; `folder` appears when all of it is on disk, or not at all.

    Args:
        folder: final name; a part that another process finished meanwhile stays.
        rows: consumed once; 1,024 of them are held at a time.
        encode: a sample, a refusal, or None for a record that was not selected; several samples of one
            record (a long text) are lines that follow each other with its id and row.
        ledger: of these rows only; takes the rejections.
        about: what part.json says of where the rows come from.

    Raises:
        UserInputError: the rows can't be read.
        MissingEnvironmentError: disk full, read-only or not permitted.
    """
    with atomic_folder(folder, keep_existing=True) as temporary:
        totals = _write_columns(temporary, ledger.take(rows), encode)
        ledger.write(temporary / "ledger.jsonl")
        described = {
            **about,
            **totals,
            "num_rows_read": ledger.num_rows_read,
            "altered_by_reason": dict(ledger.altered_by_reason),
            "files": {name: describe_file(temporary / name) for name in PART_COLUMNS},
        }
        write_json(temporary / "part.json", described)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and checksum."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _write_columns(folder: Path, records: Iterator[Record], encode: Encode) -> dict[str, int]:
    totals = {"num_records": 0, "num_tokens": 0}
    with (
        open(folder / "input_ids.bin", "wb") as ids,
        open(folder / "labels.bin", "wb") as labels,
        open(folder / "rows.arrow", "wb") as rows,
        pa.ipc.new_file(rows, ROWS_SCHEMA) as writer,
    ):
        while batch := list(islice(records, BATCH_RECORDS)):
            lines, results = _lines(batch, encode(batch))
            samples = [result for result in results if isinstance(result, Encoded)]
            flat = flat_ids(samples)
            ids.write(flat.astype(INT32, copy=False).tobytes())
            labels.write(flat_labels(samples, flat).astype(INT32, copy=False).tobytes())
            writer.write_batch(_row_batch(lines, results, flat))
            totals["num_records"] += len(lines)
            totals["num_tokens"] += len(flat)
    return totals


def _lines(
    records: Sequence[Record], results: Sequence[Result | tuple[Encoded, ...]]
) -> tuple[list[Record], list[Result]]:
    """A line for each result, and for each sample of a record that gives several."""
    found = [
        (record, one)
        for record, result in zip(records, results, strict=True)
        for one in (result if isinstance(result, tuple) else (result,))
    ]
    return [record for record, _ in found], [one for _, one in found]


def _row_batch(records: list[Record], results: Sequence[Result], flat: NDArray[np.int32]) -> pa.RecordBatch:
    hashes = zip(*(hash_row(record.content) for record in records), strict=True)
    refusals = [result if isinstance(result, Refusal) else None for result in results]
    samples = [result if isinstance(result, Encoded) else None for result in results]
    columns = [
        _texts([_storable(record.id) for record in records]),
        [record.row for record in records],
        [hash_id(record.id) for record in records],
        *hashes,
        [len(sample.ids) if sample else 0 for sample in samples],
        [sample.num_trained if sample else 0 for sample in samples],
        [REASONS.index(refusal.reason) if refusal else NO_REFUSAL for refusal in refusals],
        _details(results),
        [_change_bits(sample.changes) if sample else 0 for sample in samples],
        _lists([hash_earlier(record.content) for record in records]),
        *_id_hashes(samples, flat),
    ]
    arrays = [
        column if isinstance(column, pa.Array) else _numbers(column, field.type)
        for column, field in zip(columns, ROWS_SCHEMA, strict=True)
    ]
    return pa.record_batch(arrays, schema=ROWS_SCHEMA)


def _id_hashes(samples: Sequence[Encoded | None], flat: NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """`prompt_hash` and `sample_hash` of each row."""
    prompts, wholes, data, start = [0] * len(samples), [0] * len(samples), memoryview(flat.tobytes()), 0
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        end = start + len(sample.ids) * flat.itemsize
        answer = start + (sample.trained[-1][0] if sample.trained else len(sample.ids)) * flat.itemsize
        prompts[row] = xxh3_64_intdigest(data[start:answer])
        wholes[row] = xxh3_64_intdigest(data[start:end])
        start = end
    return prompts, wholes


def _numbers(values: Sequence[int] | NDArray[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array`, but that imports pandas (0.25 s in each worker)."""
    array = np.array(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(array)])


def _texts(texts: Sequence[str]) -> pa.Array:
    encoded = [text.encode() for text in texts]
    offsets = np.array([0, *accumulate(map(len, encoded))], np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _lists(lists: Sequence[list[int]]) -> pa.Array:
    offsets = np.array([0, *accumulate(map(len, lists))], np.int32)
    values = _numbers(list(chain.from_iterable(lists)), pa.uint64())
    return pa.ListArray.from_arrays(_numbers(offsets, pa.int32()), values)


def _details(results: Sequence[Encoded | Refusal | None]) -> pa.Array:
    """Why a row was refused, or the markers that it holds, a line each."""
    details = [_detail(result) for result in results]
    return pa.array(details, pa.string()) if any(details) else pa.nulls(len(details), pa.string())


def _detail(result: Encoded | Refusal | None) -> str | None:
    if isinstance(result, Refusal):
        return _storable(result.detail)
    return "\n".join(result.markers) or None if result else None


def _storable(text: str) -> str:
    """Ids may hold a file's name, which may hold any bytes."""
    return printable_path(text) if has_surrogates(text) else text


def _change_bits(changes: tuple[Change, ...]) -> int:
    return sum(1 << CHANGES.index(change) for change in changes)
