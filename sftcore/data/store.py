"""The token store: all samples of a run as memory-mapped columns.

In: the folder of a finished prepare. Out: `Sample`s that any number of processes read without copying.
Invariant: a folder under its final name is complete (it appears by one rename, manifest.json written last);
what doesn't match its manifest, or another fingerprint than the expected one, is refused.
Trade-off: fixed-width int32 ids cost 8 bytes a token with labels (a billion tokens: 8 GB of disk), and in
return a sample is two slices of a memory map: no decoding, no copy; opening holds 20 bytes a sample.

    part-00000/    columns of one unit of work (see parts.py)     |s0 s0 s0|s1 s1|s2|
    part-00001/    the next                                       |s3 s3|s4 s4 s4|
    outcome.bin    one byte a record over all parts: 0 where it is a sample
    ledger.jsonl   rejected and altered rows
    manifest.json  totals, sizes, checksums, fingerprint
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftcore.data.ledger import printable_path
from sftcore.data.parts import INT32
from sftcore.data.prompts import Sample
from sftcore.data.seam import UNTRAINED
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_json, sha256_of_file

FORMAT_VERSION = 2
STORE_FILES = ("outcome.bin", "ledger.jsonl")
KEPT = 0  # in outcome.bin


def open_rows(part: Path) -> pa.Table:
    """A part's records, memory-mapped."""
    with pa.memory_map(str(part / "rows.arrow")) as source:
        return pa.ipc.open_file(source).read_all()


def numbers(rows: pa.Table, name: str) -> NDArray[Any]:
    """A numeric column without nulls; `to_numpy` would import pandas (0.25 s)."""
    none = np.empty(0, rows.schema.field(name).type.to_pandas_dtype())
    return np.concatenate([none, *(np.from_dlpack(chunk) for chunk in rows[name].chunks)])


class _PartColumns:
    """One part's memory maps, and where its kept samples stand in them (S of them).

    Args (attributes):
        file: that the records stand in.
        source: 0-based training source.
        kept: (S,) int32 positions of samples among the part's records.
        offsets: (S,) int64, first token of each.
    """

    def __init__(self, folder: Path, about: dict[str, Any], is_kept: NDArray[np.bool_]) -> None:
        self.rows = open_rows(folder)
        if len(self.rows) != len(is_kept):
            raise _unusable(folder, f"rows.arrow has {len(self.rows)} records, not {len(is_kept)}")
        self.file, self.source = str(about["file"]), int(about["source"])
        num_tokens = numbers(self.rows, "num_tokens")
        self.kept = np.flatnonzero(is_kept).astype(np.int32)
        self.offsets = (np.cumsum(num_tokens, dtype=np.int64) - num_tokens)[is_kept]
        self.lengths = num_tokens[is_kept]
        self.num_trained = numbers(self.rows, "num_trained")[is_kept]
        if num_tokens.sum(dtype=np.int64) * INT32.itemsize != (folder / "input_ids.bin").stat().st_size:
            raise _unusable(folder, "columns and index don't match")
        self.input_ids = _mapped(folder / "input_ids.bin")
        self.labels = _mapped(folder / "labels.bin")

    def last_targets(self) -> NDArray[np.int32]:
        """(S,) the last trained target of each kept sample, which has one."""
        trained = np.flatnonzero(self.labels != UNTRAINED)
        return self.labels[trained[np.searchsorted(trained, self.offsets + self.lengths) - 1]]

    def sample(self, i: int) -> Sample:
        """The part's i-th kept sample."""
        start, position = int(self.offsets[i]), int(self.kept[i])
        end = start + int(self.lengths[i])
        return Sample(
            id=self.rows["id"][position].as_py(),
            input_ids=self.input_ids[start:end],
            labels=self.labels[start:end],
            num_trained=int(self.num_trained[i]),
            file=self.file,
            row=self.rows["row"][position].as_py(),
        )


def _mapped(path: Path) -> NDArray[np.int32]:
    if not path.stat().st_size:
        return np.empty(0, np.int32)
    # not np.memmap: each keeps its file open, of which 512 parts have as many as most machines allow
    with pa.memory_map(str(path)) as source:
        return np.frombuffer(source.read_buffer(), INT32)


class TokenStore:
    """An open store of N samples; `store[i]` is a `Sample` whose arrays are slices of the memory map.

    Args (attributes):
        folder: where it lies.
        manifest: content of manifest.json.
        fingerprint: of everything that decided its samples.
        lengths: (N,) int32, tokens of each sample.
        num_trained: (N,) int32, trained tokens of each sample.
        sources: (N,) int16, 0-based training source of each sample.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = str(manifest["fingerprint"])
        outcomes = np.fromfile(folder / "outcome.bin", np.uint8)
        ends = np.cumsum([0, *(about["num_records"] for about in manifest["parts"])])
        if ends[-1] != len(outcomes):
            raise _unusable(folder, "outcome.bin and manifest don't match")
        self._parts = [
            _PartColumns(folder / about["name"], about, outcomes[start:end] == KEPT)
            for about, start, end in zip(manifest["parts"], ends, ends[1:], strict=False)
        ]
        sizes = [len(part.kept) for part in self._parts]
        self._first_samples = np.cumsum([0, *sizes])
        empty = np.empty(0, np.int32)
        self.lengths: NDArray[np.int32] = np.concatenate([empty, *(part.lengths for part in self._parts)])
        self.num_trained: NDArray[np.int32] = np.concatenate([empty, *(p.num_trained for p in self._parts)])
        self.sources = np.repeat(np.array([part.source for part in self._parts], np.int16), sizes)

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
        for folder_, described in [(folder, manifest), *((folder / p["name"], p) for p in manifest["parts"])]:
            _check_sizes(folder_, described["files"])
        try:
            store = cls(folder, manifest)
        except (pa.ArrowInvalid, KeyError) as error:
            raise _unusable(folder, f"rows.arrow can't be read: {error}") from error
        store._check_totals()
        return store

    def _check_totals(self) -> None:
        found = {
            "num_samples": len(self.lengths),
            "num_tokens": int(self.lengths.sum(dtype=np.int64)),
            "num_trained_tokens": int(self.num_trained.sum(dtype=np.int64)),
        }
        wrong = [
            f"{key}: {n}, not {self.manifest[key]}" for key, n in found.items() if n != self.manifest[key]
        ]
        if wrong:
            raise _unusable(self.folder, "columns and manifest don't match", got="; ".join(wrong))

    def described_files(self) -> dict[Path, dict[str, Any]]:
        """Every file of the store with its size and checksum."""
        folders = [
            (self.folder, self.manifest),
            *((self.folder / p["name"], p) for p in self.manifest["parts"]),
        ]
        return {folder / name: about for folder, of in folders for name, about in of["files"].items()}

    def verify(self, digest: Callable[[Path], str] = sha256_of_file) -> None:
        """Compare every byte with the manifest's checksums, on all cores (1 GB/s each).

        Args:
            digest: SHA-256 of a file, perhaps remembered; called by several threads.

        Raises:
            UserInputError: a file was changed.
        """
        files = self.described_files()
        with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
            digests = list(pool.map(digest, files))
        for (path, described), found in zip(files.items(), digests, strict=True):
            if found != described["sha256"]:
                name = path.relative_to(self.folder)
                raise _unusable(self.folder, f"{name} was changed after it was written")

    @property
    def ids(self) -> list[str]:
        """Record ids in the store's order."""
        return [id for part in self._parts for id in part.rows["id"].take(pa.array(part.kept)).to_pylist()]

    @property
    def labels_of_pairs(self) -> NDArray[np.int8]:
        """(N,) label of each pair; -1 for samples that are none."""
        empty = np.empty(0, np.int8)
        return np.concatenate([empty, *(numbers(part.rows, "label")[part.kept] for part in self._parts)])

    @property
    def last_targets(self) -> NDArray[np.int32]:
        """(N,) last trained target of each sample: the stop token, where answers end; reads all labels."""
        return np.concatenate([np.empty(0, np.int32), *(part.last_targets() for part in self._parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        part = int(np.searchsorted(self._first_samples, i, side="right")) - 1
        return self._parts[part].sample(i - int(self._first_samples[part]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def _check_sizes(folder: Path, files: dict[str, Any]) -> None:
    for name, described in files.items():
        num_bytes = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if num_bytes != described["bytes"]:
            raise _unusable(folder, f"{name} has {num_bytes} bytes, not {described['bytes']}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").is_file():
        raise _unusable(folder, "no token store here (no manifest.json)")
    manifest = read_json(folder / "manifest.json")
    keys = {"num_samples", "num_tokens", "num_trained_tokens", "fingerprint", "format_version", "files"}
    if not isinstance(manifest, dict) or keys - set(manifest):
        raise _unusable(folder, "manifest.json is not that of a token store")
    is_ours = manifest["format_version"] == FORMAT_VERSION
    if is_ours and (set(manifest["files"]) != set(STORE_FILES) or "parts" not in manifest):
        raise _unusable(folder, "manifest.json is not that of a token store")
    return manifest


def _unusable(folder: Path, what: str, *, got: str = "") -> UserInputError:
    remedy = "remove the folder and run `sftcore prepare RECIPE`"
    return UserInputError(Problem(what=what, where=printable_path(str(folder)), got=got, remedy=remedy))
