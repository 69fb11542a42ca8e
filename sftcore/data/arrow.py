"""Rows of Parquet files and of Hugging Face data sets, on disk (`save_to_disk`) or by name.

In: a Parquet file, a data set folder, or a `hub:` name. Out: `RawRow`s whose values are objects; identities.
Invariant: a data set is known by the bytes of its Arrow files, and which of their rows were asked for, so a
cache key never depends on when or how it was loaded (trl#6206: a hash that never repeats; datasets' own
fingerprint is another for the same file elsewhere).
Trade-off: rows become Python objects, 1,000 at a time (1 MB at 1 kB a row), so that all formats share one set
of checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sftcore.config import Source
from sftcore.data.rows import RawRow, Span, damaged, read_errors_explained
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import sha256_of_file
from sftcore.recipe import HUB_PREFIX

BATCH_ROWS = 1000
PARQUET = ".parquet"


def is_dataset(file: Path) -> bool:
    """Whether `file` names a data set: `hub:...`, or a folder."""
    return str(file).startswith(HUB_PREFIX) or file.is_dir()


def is_arrow(file: Path) -> bool:
    """Whether rows come through Arrow: Parquet files and data sets."""
    return _is_parquet(file) or is_dataset(file)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == PARQUET


def arrow_rows(source: Source, file: Path, span: Span) -> Iterator[RawRow]:
    """The rows of a span: of row groups (Parquet) or rows (data sets).

    Raises:
        UserInputError: the file is damaged, or no data set.
        MissingEnvironmentError: a name that is neither cached nor reachable.
    """
    batches = _parquet_batches(file, span) if _is_parquet(file) else _dataset_batches(source, file, span)
    number = span.first_row
    for batch in batches:
        for value in batch:
            yield RawRow(number=number, value=value)
            number += 1


def _parquet_batches(file: Path, span: Span) -> Iterator[list[dict[str, Any]]]:
    import pyarrow as pa

    parquet = _open_parquet(file)
    groups = range(span.start, parquet.num_row_groups if span.end is None else span.end)
    with read_errors_explained(file), parquet:
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(groups), use_threads=False):
                yield _objects(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(file, f"damaged Parquet file: {error}", remedy="fetch it again") from error


def _objects(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; bytes that are not UTF-8 become lone surrogates, which checks of texts find."""
    import pyarrow as pa

    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        fields = [(field.name, plain.get(field.type, field.type)) for field in batch.schema]
        rows = batch.cast(pa.schema(fields)).to_pylist()
        texts = [field.name for field in batch.schema if field.type in plain]
        for row in rows:
            row |= {n: row[n].decode(errors="surrogateescape") for n in texts if row[n] is not None}
    return rows


def _open_parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with read_errors_explained(file):
        try:
            return pq.ParquetFile(file)
        except (pa.ArrowException, ValueError) as error:
            raise damaged(file, f"not a Parquet file: {error}", remedy="fetch it again") from error


def _dataset_batches(source: Source, file: Path, span: Span) -> Iterator[list[dict[str, Any]]]:
    dataset = open_dataset(str(file), source.subset, source.split)
    end = len(dataset) if span.end is None else span.end
    for start in range(span.start, end, BATCH_ROWS):
        columns = dataset[start : min(start + BATCH_ROWS, end)]
        yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@lru_cache(maxsize=8)
def open_dataset(path: str, subset: str | None = None, split: str | None = None) -> Any:
    """A data set by folder or `hub:` name, memory-mapped.

    Raises:
        UserInputError: no data set there, or several splits.
        MissingEnvironmentError: a name that is neither cached nor reachable.
    """
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    if path.startswith(HUB_PREFIX):
        return _by_name(path, subset, split)
    try:
        dataset = datasets.load_from_disk(path, keep_in_memory=False)
    except Exception as error:  # datasets raises whatever its JSON and Arrow readers do
        remedy = (
            "a folder must be one that `Dataset.save_to_disk` wrote; for files, give a glob such as DIR/*"
        )
        raise damaged(
            Path(path), f"no data set in this folder: {_first_line(error)}", remedy=remedy
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        names = ", ".join(f"{path}/{name}" for name in dataset)
        raise damaged(Path(path), "this data set has several splits", remedy=f"name one of them: {names}")
    return dataset


def _by_name(path: str, subset: str | None, split: str | None) -> Any:
    import datasets

    name = path.removeprefix(HUB_PREFIX)
    try:
        # else HF_DATASETS_IN_MEMORY_MAX_SIZE may leave it without files to be known by
        return datasets.load_dataset(name, subset, split=split, keep_in_memory=False)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        remedy = "load it once on a machine with network, or save it to a folder (save_to_disk) and name that"
        raise MissingEnvironmentError(
            Problem(what=f"can't get the data set: {_first_line(error)}", where=path, remedy=remedy)
        ) from error
    except ValueError as error:  # an unknown subset or split
        raise UserInputError(Problem(what=f"can't load it: {_first_line(error)}", where=path)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def dataset_files(source: Source, file: Path) -> list[Path]:
    """The files that hold a data set's rows."""
    if str(file).startswith(HUB_PREFIX):
        dataset = open_dataset(str(file), source.subset, source.split)
        return sorted(Path(entry["filename"]) for entry in dataset.cache_files)
    return sorted(file.rglob("*.arrow"))


def identity_of(source: Source, file: Path, digest: Callable[[Path], str] = sha256_of_file) -> str:
    """SHA-256 of a source file's bytes; of a data set, of its files, its number of rows, and which they are.

    Raises:
        UserInputError: unreadable.
    """
    with read_errors_explained(file):
        if not is_dataset(file):
            return digest(file)
        num_rows = len(open_dataset(str(file), source.subset, source.split))
        digests = [digest(f) for f in dataset_files(source, file)]
        # train[:3] and train[3:6] share their files; those of a folder are all of its rows
        chosen = [f"{source.subset}/{source.split}"] if str(file).startswith(HUB_PREFIX) else []
        return " ".join([*digests, f"{num_rows} rows", *chosen])


def arrow_spans(source: Source, file: Path, part_bytes: int) -> list[tuple[Span, int]]:
    """Spans of about `part_bytes`, with their bytes: groups of Parquet row groups, or runs of rows."""
    return _parquet_spans(file, part_bytes) if _is_parquet(file) else _row_spans(source, file, part_bytes)


def _parquet_spans(file: Path, part_bytes: int) -> list[tuple[Span, int]]:
    metadata = _open_parquet(file).metadata
    spans: list[tuple[Span, int]] = []
    first_group, first_row, num_bytes, num_rows = 0, 1, 0, 0
    for group in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(group).total_byte_size
        num_rows += metadata.row_group(group).num_rows
        if num_bytes >= part_bytes or group + 1 == metadata.num_row_groups:
            spans.append((Span(start=first_group, end=group + 1, first_row=first_row), num_bytes))
            first_group, first_row, num_bytes, num_rows = group + 1, first_row + num_rows, 0, 0
    return spans or [(Span(), 0)]


def _row_spans(source: Source, file: Path, part_bytes: int) -> list[tuple[Span, int]]:
    num_rows = len(open_dataset(str(file), source.subset, source.split))
    total = sum(f.stat().st_size for f in dataset_files(source, file))
    per_part = max(1, num_rows * part_bytes // max(1, total))
    starts = range(0, max(1, num_rows), per_part)
    return [
        (Span(start=s, end=min(s + per_part, num_rows), first_row=s + 1), total // len(starts))
        for s in starts
    ]
