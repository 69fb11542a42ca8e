"""Files of weights: whole or named, and the same as when they were written.

In: a model or adapter folder. Out: nothing, or a message that names each file at fault.
Invariant: a file that was cut or is something else is refused before any weight is used; a result's folder
holds the checksums of all that decides its numbers (`sha256sum -c weights.sha256` checks them, too).
Trade-off: at a load only sizes and headers are looked at (1 ms a file); bytes are compared before an
evaluation and an export, which read all of them anyhow (1 s a gigabyte).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file, sha256_of_file
from sftcore.model.identity import model_files
from sftcore.paths import file_fault
from sftcore.settings import CHECKSUMS, MATCHING_FILE

LINE = re.compile(r"([0-9a-f]{64})  ([^/]+)")
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
OLD_PICKLE = b"\x80"  # torch.save before 1.6 wrote no zip file
MAX_HEADER_BYTES = 100_000_000  # of safetensors, by its own rule
FETCH = "fetch or copy the model again: the copy was cut off, or the disk was full"


def check_weight_files(folder: Path) -> None:
    """Refuse a local folder with a file of weights that can't be whole.

    Raises:
        UserInputError: all of them by name, with what is wrong.
    """
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    faults = {file: fault for file in files if (fault := _fault(file))}
    faults |= dict(_index_faults(folder))
    if faults:
        raise UserInputError(
            *(
                Problem(what=f"no whole file of weights: {fault}", where=str(file), remedy=FETCH)
                for file, fault in faults.items()
            )
        )


def _fault(file: Path) -> str:
    try:
        if fault := file_fault(file):
            return fault
        return _safetensors_fault(file) if file.suffix == ".safetensors" else _pickle_fault(file)
    except OSError as error:
        return f"can't be read: {error.strerror}"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file by name (dtype, shape, data_offsets), and where their data begin.

    The format (github.com/huggingface/safetensors): 8 bytes little-endian header size, JSON header, data.

    Raises:
        ValueError: the file is no whole one of these; it says what is wrong.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"it has {size:,} bytes and ends in its header, or is not a safetensors file")
        header = handle.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError("its header is damaged") from error
    if size != expected:
        raise ValueError(f"it has {size:,} bytes instead of {expected:,}")
    return entries, 8 + length


def _safetensors_fault(file: Path) -> str:
    try:
        read_header(file)
    except ValueError as fault:
        return str(fault)
    return ""


def _pickle_fault(file: Path) -> str:
    with open(file, "rb") as handle:
        is_old = handle.read(1) == OLD_PICKLE
    return "" if is_old or zipfile.is_zipfile(file) else "it is cut off, or no file of torch's"


def _index_faults(folder: Path) -> Iterator[tuple[Path, str]]:
    for index in sorted(folder.glob("*.index.json")):
        try:
            names: Any = set(json.loads(index.read_bytes().decode())["weight_map"].values())
            missing = sorted(name for name in names if not (folder / name).is_file())
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            yield index, "the list of its files is damaged"
            continue
        if missing:
            yield index, f"it names files that are not there: {', '.join(missing)[:200]}"


def write_checksums(folder: Path) -> None:
    """Write `CHECKSUMS` of the files that decide a model's numbers, as the last of its files."""
    with atomic_file(folder / CHECKSUMS) as handle:
        handle.writelines(f"{digest}  {name}\n" for name, digest in _digests(folder).items())


def _digests(folder: Path) -> dict[str, str]:
    files = [*model_files(folder), *(file for file in [folder / MATCHING_FILE] if file.is_file())]
    return {file.name: sha256_of_file(file) for file in sorted(files)}


def check_unchanged(folder: Path) -> None:
    """Refuse a result whose files are not those that were written; one without checksums is let through.

    Raises:
        UserInputError: naming the files.
    """
    file = folder / CHECKSUMS
    if not (file.exists() or file.is_symlink()):
        return
    changed = _changed(folder, _read_checksums(file))
    if changed:
        raise UserInputError(
            Problem(
                what="these weights have changed since they were written",
                where=str(folder),
                got="; ".join(changed)[:400],
                remedy=f"put the files back (scores of before stay as they are), or, if the change is meant, "
                f"delete {file} and score the folder as a model of its own: --model",
            )
        )


def _changed(folder: Path, written: dict[str, str]) -> list[str]:
    now = _digests(folder)
    return [
        f"{name} {'is gone' if name not in now else 'is new' if name not in written else 'is another'}"
        for name in sorted(written.keys() | now.keys())
        if written.get(name) != now.get(name)
    ]


def _read_checksums(file: Path) -> dict[str, str]:
    try:
        lines = file.read_bytes().decode("ascii").splitlines()
        found = [LINE.fullmatch(line) for line in lines]
    except (OSError, UnicodeDecodeError):
        found = [None]
    if not found or None in found:
        remedy = "put the file back; or delete it, and nothing tells whether the weights have changed"
        raise UserInputError(Problem(what="damaged checksums", where=str(file), remedy=remedy))
    return {match[2]: match[1] for match in found if match}
