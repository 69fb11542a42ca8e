"""Weights on their way from file to file: read by name, changed, written in shards.

In: one or several model folders with safetensors files, or weights as they come from training. Out: files
of at most so many bytes with their index, or the same files with other values, in a folder that appears by
rename, checksums last.
Invariant: what is held at once is one shard of what is written (`SHARD_BYTES`, or one layer), or, where
shapes and dtypes stay, one stretch (`CHUNK` weights) of each folder; never a model.
Trade-off: values are changed by one pass over the files, 1 s a gigabyte, whatever fits into memory.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_folder, write_json
from sftcore.log import progress
from sftcore.model.weight_files import check_weight_files, read_header, write_checksums
from sftcore.settings import CHECKSUMS

CHUNK = 2**22  # weights in memory at once: 8 MB in bfloat16, about 100 MB with all that is worked out
SHARD_BYTES = 2 * 10**9
WHOLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"\D*\.\d+\.|.*")  # of "model.layers.3.mlp.up_proj.weight": "model.layers.3."
# fmt: off
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
# fmt: on
WEIGHTS = ("BF16", "F16", "F32")  # what models are trained in
Named = tuple[str, torch.Tensor]
Change = Callable[[str, Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where a tensor's bytes lie.

    Args:
        file: a safetensors file.
        dtype: as its header names it.
        shape: of the tensor.
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def offset(self, begin: int) -> int:
        """Where in the file weight number `begin` lies."""
        return self.start + begin * DTYPES[self.dtype].itemsize

    def read(self, handle: IO[bytes], begin: int, count: int) -> torch.Tensor:
        """(count,) weights from number `begin` on."""
        dtype = DTYPES[self.dtype]
        if not count:
            return torch.empty(0, dtype=dtype)
        handle.seek(self.offset(begin))
        buffer = bytearray(count * dtype.itemsize)
        handle.readinto(buffer)  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=dtype)

    def tensor(self) -> torch.Tensor:
        """All of it."""
        with open(self.file, "rb") as handle:
            return self.read(handle, 0, self.size).view(self.shape)


@contextmanager
def model_folder(folder: Path, *, like: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder; on success its files get checksums and it becomes `folder`, else it goes.

    Args:
        like: a folder whose files it holds from the start.
    """
    with atomic_folder(folder) as temporary:
        if like is not None:
            shutil.copytree(like, temporary, dirs_exist_ok=True)
            (temporary / CHECKSUMS).unlink(missing_ok=True)  # of the weights that were copied
        yield temporary
        write_checksums(temporary)


def read_spans(folder: Path, pattern: str = "*.safetensors") -> dict[str, Span]:
    """The tensors of a folder's safetensors files by name, in the files' order.

    Raises:
        UserInputError: no such files, or a damaged one.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        remedy = (
            f"give a model folder with {pattern} files (sftcore model pull NAME --to DIR; of an adapter: "
            "sftcore export --merge first)"
        )
        raise UserInputError(Problem(what="no safetensors files", where=str(folder), remedy=remedy))
    check_weight_files(folder)
    spans = {}
    for file in files:
        entries, start = read_header(file)
        for name, entry in entries.items():
            begin = start + entry["data_offsets"][0]
            spans[name] = Span(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=begin)
    return spans


def aligned(folders: Sequence[Path]) -> dict[str, tuple[Span, ...]]:
    """The weights (`WEIGHTS`) that all folders hold: name -> where they are in each, sorted by name.

    Raises:
        UserInputError: one differs from the first in names or shapes; the first differences are named.
    """
    held = [{n: s for n, s in read_spans(folder).items() if s.dtype in WEIGHTS} for folder in folders]
    wrong = sorted(
        name
        for name in set().union(*held)
        if len({found[name].shape if name in found else None for found in held}) > 1
    )
    if wrong:
        which = "both" if len(folders) == 2 else "all"
        raise UserInputError(
            Problem(
                what=f"{len(wrong)} tensors are not in {which} folders with the same shape",
                where=" and ".join(map(str, folders)),
                got=", ".join(wrong[:3]),
                remedy="give folders of one model, such as before and after its training",
            )
        )
    return {name: tuple(found[name] for found in held) for name in sorted(held[0])}


def stretches(spans: Sequence[Span]) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Weights of one tensor in several folders, stretch by stretch: number of the first, (n,) of each."""
    with ExitStack() as stack:
        handles = [stack.enter_context(open(span.file, "rb")) for span in spans]
        for begin in range(0, spans[0].size, CHUNK):
            count = min(CHUNK, spans[0].size - begin)
            yield (
                begin,
                [span.read(handle, begin, count) for span, handle in zip(spans, handles, strict=True)],
            )


def change_weights(
    weights: Mapping[str, Sequence[Span]], folder: Path, change: Change, *, label: str
) -> None:
    """Give the weights in `folder` other values, in place.

    Args:
        weights: as `aligned` gives them; `folder` is a copy of the one that the first spans lie in.
        change: change(name, weights of each folder) is what is written, (n,) in the first one's dtype; called
            stretch by stretch in the order of `weights`. Where it gives the first back, nothing is written.
        label: of the progress.
    """
    with progress(f"{label} (tensors)", len(weights)) as advance:
        for name, spans in weights.items():
            for begin, parts in stretches(spans):
                changed = change(name, parts)
                if changed is not parts[0]:
                    with open(folder / spans[0].file.name, "r+b") as handle:
                        handle.seek(spans[0].offset(begin))
                        handle.write(changed.view(torch.uint8).numpy().data)
            advance(1)


def shards_of(weights: Iterable[Named], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Runs of weights of at most `max_bytes`; a layer's stay together, for files may hold them joined."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for _, layer in groupby(weights, key=lambda named: LAYER.match(named[0])[0]):  # type: ignore[index]
        held = dict(layer)
        num_bytes = sum(tensor.nbytes for tensor in held.values())
        if shard and size + num_bytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard |= held
        size += num_bytes
    if shard:
        yield shard


def write_shards(shards: Iterable[dict[str, torch.Tensor]], folder: Path) -> list[str]:
    """Write model.safetensors, or numbered files and their index, named as transformers does; their names."""
    written: list[tuple[Path, list[str], int]] = []
    for number, shard in enumerate(shards, 1):
        file = folder / f"part-{number}.safetensors"
        contiguous = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(contiguous, file, metadata={"format": "pt"})
        written.append((file, list(shard), sum(tensor.nbytes for tensor in shard.values())))
    if len(written) == 1:
        written[0][0].rename(folder / WHOLE_FILE)
        return [WHOLE_FILE]
    weight_map: dict[str, str] = {}
    for number, (file, names, _) in enumerate(written, 1):
        target = folder / f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.rename(target)
        weight_map |= dict.fromkeys(names, target.name)
    total = sum(size for _, _, size in written)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sorted(set(weight_map.values()))
