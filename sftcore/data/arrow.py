"""Rows of Parquet files and of Hugging Face data sets, on disk (`save_to_disk`) or by name.

In: a Parquet file, a data set folder, or a `hub:` name. Out: `RawRow`s whose values are objects; identities.
Invariant: only columns that are read are decoded; a data set is known by the bytes of its Arrow files, and
which of their rows were asked for, so a cache key never depends on when or how it was loaded (trl#6206: a
hash that never repeats; datasets' own fingerprint is another for the same file elsewhere).
Trade-off: rows become Python objects, 1,000 at a time (1 MB at 1 kB a row), so that all formats share one set
of checks.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sftcore.config import Source
from sftcore.data.arrow_values import python_rows
from sftcore.data.ledger import Alteration, Change
from sftcore.data.metadata import Place, is_metadata
from sftcore.data.rows import Note, RawRow, Span, damaged, ignore, read_errors_explained
from sftcore.data.turns import SHAREGPT, SYSTEM_NAMES
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import sha256_of_file
from sftcore.recipe import HUB_PREFIX

BATCH_ROWS = 1000
PARQUET = ".parquet"
ARROW_SCHEMA = b"ARROW:schema"


def is_dataset(file: Path) -> bool:
    """Whether `file` names a data set: `hub:...`, or a folder."""
    return str(file).startswith(HUB_PREFIX) or file.is_dir()


def is_arrow(file: Path) -> bool:
    """Whether rows come through Arrow: Parquet files and data sets."""
    return _is_parquet(file) or is_dataset(file)


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == PARQUET


def arrow_rows(source: Source, file: Path, span: Span, note: Note = ignore) -> Iterator[RawRow]:
    """The rows of a span: of row groups (Parquet) or rows (data sets), with the columns that are read.

    Raises:
        UserInputError: the file is damaged, no data set, or has two columns of one name.
        MissingEnvironmentError: a name that is neither cached nor reachable.
    """
    batches = _parquet_batches if _is_parquet(file) else _dataset_batches
    number = span.first_row
    for batch in batches(source, file, span, note):
        for value in python_rows(batch):
            yield RawRow(number=number, value=value)
            number += 1


def _parquet_batches(source: Source, file: Path, span: Span, note: Note) -> Iterator[Any]:
    import pyarrow as pa

    parquet = _open_parquet(file)
    groups = range(span.start, parquet.num_row_groups if span.end is None else span.end)
    with read_errors_explained(file), parquet:
        names = _columns_read(source, file, parquet.schema_arrow, span, note)
        try:
            yield from parquet.iter_batches(
                BATCH_ROWS, row_groups=list(groups), columns=names, use_threads=False
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(file, f"damaged Parquet file: {error}", remedy="fetch it again") from error


def _open_parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with read_errors_explained(file):
        try:
            parquet = pq.ParquetFile(file)
            if any(_holds_dictionary(field.type) for field in parquet.schema_arrow):
                parquet.close()
                return pq.ParquetFile(pa.BufferReader(_without_arrow_schema(file)))
            return parquet
        except (pa.ArrowException, ValueError) as error:
            raise damaged(file, f"not a Parquet file: {error}", remedy="fetch it again") from error


def _holds_dictionary(kind: Any) -> bool:
    """Whether a dictionary lies within a list or struct, of which Arrow refuses all for one bad text."""
    import pyarrow as pa

    inner = [kind.field(i).type for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return any(pa.types.is_dictionary(part) or _holds_dictionary(part) for part in inner)


def _without_arrow_schema(file: Path) -> Any:
    """The bytes of a Parquet file, in which dictionaries are the texts that they stand for.

    The writer's Arrow types lie under a key of the footer, which is renamed in a private mapping.
    """
    import pyarrow as pa

    with open(file, "rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    footer = len(mapped) - 8 - int.from_bytes(mapped[-8:-4], "little")
    if (key := mapped.find(ARROW_SCHEMA, max(0, footer))) >= 0:
        mapped[key : key + len(ARROW_SCHEMA)] = ARROW_SCHEMA.lower()
    return pa.py_buffer(mapped)


def _dataset_batches(source: Source, file: Path, span: Span, note: Note) -> Iterator[Any]:
    """Arrow tables, whatever format the data set was saved with; its own decoders are not run."""
    dataset = open_dataset(str(file), source.subset, source.split)
    names = _columns_read(source, file, dataset.features.arrow_schema, span, note)
    tables = dataset.select_columns(names).with_format("arrow")
    end = len(dataset) if span.end is None else span.end
    for start in range(span.start, end, BATCH_ROWS):
        yield tables[start : min(start + BATCH_ROWS, end)]


def _columns_read(source: Source, file: Path, schema: Any, span: Span, note: Note) -> list[str]:
    """Names of the columns that a source reads, or has to look into before they are left out.

    Bytes (sounds, pictures) are never looked into unless the recipe names their column, nor numbers that are
    meta data by their names; that is noted.
    """
    names = list(schema.names)
    asked = _asked(source)
    if twice := [name for name in asked if names.count(name) > 1]:
        raise damaged(file, f"two columns are named {twice[0]!r}", remedy="rename one of them")
    if source.format != "jsonl":
        return [name for name in names if name in asked] or names
    place: Place = "turns" if {source.columns.messages or "messages", SHAREGPT} & set(names) else "prompt"
    left = {"*"} & set(source.columns.ignore)
    read = []
    for name in dict.fromkeys(names):
        if name in asked:
            read.append(name)
        elif left or name in source.columns.ignore:
            continue
        elif names.count(name) == 1 and _is_looked_into(name, schema.field(name).type, place):
            read.append(name)
        elif span.first_row == 1:
            note(Alteration(file=str(file), row=1, change=Change.COLUMN_LEFT_OUT, detail=name))
    return read or [name for name in names if names.count(name) == 1]


def _asked(source: Source) -> frozenset[str]:
    columns = source.columns
    own = {"id"} if columns.id == "id" else {str(columns.id)}
    match source.format:
        case "pairs":
            return frozenset({str(name) for name in columns.of_pair().values()} | own)
        case "facts" | "entityquestions":
            return frozenset({"relation", "subject", "answers", "question"} | own)
    texts = [columns.prompt, columns.completion, columns.input, columns.messages or "messages", SHAREGPT]
    return frozenset({*filter(None, texts), *SYSTEM_NAMES, *own})


def _is_looked_into(name: str, kind: Any, place: Place) -> bool:
    """Whether a column's values may decide what is trained."""
    import pyarrow as pa

    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)
    return not (_is_bytes(kind) or (is_number and is_metadata(name, place)))


def _is_bytes(kind: Any) -> bool:
    """Whether a column holds bytes, or bytes with a path (how data sets keep sounds and pictures)."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


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
