"""The token store: all samples of a run as flat, memory-mapped columns.

In: a stream of `Sample`s. Out: a folder that any number of processes open without copying.
Invariant: a folder under its final name is complete (it appears by one rename, manifest.json written last);
what doesn't match its manifest, or another fingerprint than the expected one, is refused.
Trade-off: fixed-width int32 ids cost 8 bytes a token with labels (a billion tokens: 8 GB of disk), and in
return a sample is two slices of a memory map: no decoding, no copy, RAM flat in the number of rows.

    input_ids.bin  int32 ids of all samples, end to end        |s0 s0 s0|s1 s1|s2 s2 s2 s2|
    labels.bin     int32 targets, likewise                      ^0       ^3    ^5
    index.arrow    id, file, row, offset (int64), num_tokens (int32), num_trained (int32): one row a sample
    ledger.jsonl   rejected and altered rows
    manifest.json  totals, sizes, checksums, fingerprint
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftcore.data.ledger import Ledger, printable_path
from sftcore.data.prompts import Sample
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_folder, read_json, sha256_of_file, write_json

FORMAT_VERSION = 1
BATCH_SAMPLES = 1024  # written at once: about 1 MB at 128 tokens a sample
COLUMNS = ("input_ids.bin", "labels.bin", "index.arrow", "ledger.jsonl")
PACKAGES = ("numpy", "pyarrow", "tokenizers", "transformers")
INT32 = np.dtype("<i4")
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("offset", pa.int64()),
        ("num_tokens", pa.int32()),
        ("num_trained", pa.int32()),
    ]
)


def write_store(folder: Path, samples: Iterable[Sample], *, fingerprint: str, ledger: Ledger) -> None:
    """Write a store; `folder` appears when all of it is on disk, or not at all.

    Args:
        folder: final name; a store that another process finished meanwhile stays.
        samples: consumed once; 1,024 of them are held at a time.
        fingerprint: of everything that decided the samples.
        ledger: of the rows that the samples come from; read after the last sample.

    Raises:
        UserInputError: there are no samples.
        MissingEnvironmentError: disk full, read-only or not permitted.
    """
    with atomic_folder(folder, keep_existing=True) as temporary:
        totals = _write_columns(temporary, samples)
        ledger.write(temporary / "ledger.jsonl")
        manifest = {
            "num_rows_read": ledger.num_rows_read,
            "num_samples": totals["num_samples"],
            "num_rejected": ledger.num_rejected,
            "num_not_selected": ledger.num_not_selected,
            "rejected_by_reason": dict(sorted(ledger.rejected_by_reason.items())),
            "altered_by_reason": dict(sorted(ledger.altered_by_reason.items())),
            "num_tokens": totals["num_tokens"],
            "num_trained_tokens": totals["num_trained_tokens"],
            "fingerprint": fingerprint,
            "format_version": FORMAT_VERSION,
            "created_with": {name: version(name) for name in PACKAGES},
            "files": {name: _describe_file(temporary / name) for name in COLUMNS},
        }
        write_json(temporary / "manifest.json", manifest)


def _write_columns(folder: Path, samples: Iterable[Sample]) -> dict[str, int]:
    totals = {"num_samples": 0, "num_tokens": 0, "num_trained_tokens": 0}
    samples = iter(samples)
    with (
        open(folder / "input_ids.bin", "wb") as ids,
        open(folder / "labels.bin", "wb") as labels,
        open(folder / "index.arrow", "wb") as index,
        pa.ipc.new_file(index, INDEX_SCHEMA) as index_writer,
    ):
        while batch := list(islice(samples, BATCH_SAMPLES)):
            ids.write(np.concatenate([sample.input_ids for sample in batch]).astype(INT32).tobytes())
            labels.write(np.concatenate([sample.labels for sample in batch]).astype(INT32).tobytes())
            rows = _index_rows(batch, first_offset=totals["num_tokens"])
            index_writer.write_batch(rows)
            totals["num_samples"] += len(batch)
            totals["num_tokens"] += sum(len(sample.input_ids) for sample in batch)
            totals["num_trained_tokens"] += sum(sample.num_trained for sample in batch)
    if not totals["num_samples"]:
        raise UserInputError(Problem(what="no row became a training sample", where="data.train"))
    return totals


def _index_rows(batch: list[Sample], *, first_offset: int) -> pa.RecordBatch:
    lengths = [len(sample.input_ids) for sample in batch]
    offsets = first_offset + np.cumsum([0, *lengths[:-1]])
    columns = [
        [sample.id for sample in batch],
        [printable_path(sample.file) for sample in batch],
        [sample.row for sample in batch],
        offsets,
        lengths,
        [sample.num_trained for sample in batch],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=INDEX_SCHEMA)


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


class TokenStore:
    """An open store of N samples; `store[i]` is a `Sample` whose arrays are slices of the memory map.

    Args (attributes):
        folder: where it lies.
        manifest: content of manifest.json.
        fingerprint: of everything that decided its samples.
        lengths: (N,) int32, tokens of each sample.
        num_trained: (N,) int32, trained tokens of each sample.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = str(manifest["fingerprint"])
        with pa.memory_map(str(folder / "index.arrow")) as source:
            self._index = pa.ipc.open_file(source).read_all()
        self.lengths: NDArray[np.int32] = self._index["num_tokens"].to_numpy()
        self.num_trained: NDArray[np.int32] = self._index["num_trained"].to_numpy()
        self._offsets: NDArray[np.int64] = self._index["offset"].to_numpy()
        # a plain array over the map: slicing np.memmap itself costs 5 times as much
        self._input_ids = np.memmap(folder / "input_ids.bin", INT32, mode="r").view(np.ndarray)
        self._labels = np.memmap(folder / "labels.bin", INT32, mode="r").view(np.ndarray)

    @classmethod
    def open(cls, folder: Path, expected_fingerprint: str | None = None) -> TokenStore:
        """Open the store in `folder` after checking sizes and totals against its manifest.

        Raises:
            UserInputError: no store, a damaged one, another format, or another fingerprint.
        """
        manifest = _read_manifest(folder)
        if manifest["format_version"] != FORMAT_VERSION:
            raise _unusable(folder, f"store format {manifest['format_version']}, this is {FORMAT_VERSION}")
        if expected_fingerprint not in (None, manifest["fingerprint"]):
            raise _unusable(
                folder,
                "stale: data, template, tokenizer or options have changed since it was written",
                got=f"{manifest['fingerprint']}, expected {expected_fingerprint}",
            )
        for name, described in manifest["files"].items():
            num_bytes = (folder / name).stat().st_size if (folder / name).is_file() else 0
            if num_bytes != described["bytes"]:
                raise _unusable(folder, f"{name} has {num_bytes} bytes, not {described['bytes']}")
        try:
            store = cls(folder, manifest)
        except (pa.ArrowInvalid, KeyError) as error:
            raise _unusable(folder, f"index.arrow can't be read: {error}") from error
        store._check_totals()
        return store

    def _check_totals(self) -> None:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        found = {
            "num_samples": len(self.lengths),
            "num_tokens": int(ends[-1]),
            "num_trained_tokens": int(self.num_trained.sum(dtype=np.int64)),
        }
        wrong = [
            f"{key}: {n}, not {self.manifest[key]}" for key, n in found.items() if n != self.manifest[key]
        ]
        if (
            wrong
            or len(self._input_ids) != ends[-1]
            or not np.array_equal(self._offsets, ends - self.lengths)
        ):
            raise _unusable(self.folder, "columns and manifest don't match", got="; ".join(wrong))

    def verify(self) -> None:
        """Compare every byte with the manifest's checksums (1 GB/s).

        Raises:
            UserInputError: a file was changed.
        """
        for name, described in self.manifest["files"].items():
            if sha256_of_file(self.folder / name) != described["sha256"]:
                raise _unusable(self.folder, f"{name} was changed after it was written")

    @property
    def ids(self) -> list[str]:
        """Record ids in the store's order."""
        ids: list[str] = self._index["id"].to_pylist()
        return ids

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        start = int(self._offsets[i])
        end = start + int(self.lengths[i])
        return Sample(
            id=self._index["id"][i].as_py(),
            input_ids=self._input_ids[start:end],
            labels=self._labels[start:end],
            num_trained=int(self.num_trained[i]),
            file=self._index["file"][i].as_py(),
            row=self._index["row"][i].as_py(),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").is_file():
        raise _unusable(folder, "no token store here (no manifest.json)")
    manifest = read_json(folder / "manifest.json")
    keys = {"num_samples", "num_tokens", "num_trained_tokens", "fingerprint", "format_version", "files"}
    if not isinstance(manifest, dict) or keys - set(manifest) or set(manifest["files"]) != set(COLUMNS):
        raise _unusable(folder, "manifest.json is not that of a token store")
    return manifest


def _unusable(folder: Path, what: str, *, got: str = "") -> UserInputError:
    remedy = "remove the folder and run `sftcore prepare RECIPE`"
    return UserInputError(Problem(what=what, where=printable_path(str(folder)), got=got, remedy=remedy))
