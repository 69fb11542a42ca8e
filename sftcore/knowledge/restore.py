"""Restoring parameters: the weights that fine-tuning changed most, relatively, go back to their base values.

In: a base folder, a tuned folder of the same architecture, percentages. Out: for each percentage a folder
like the tuned one with that share of its weights restored, and restore.json with what was restored where.
Invariant: exactly round(percent/100 * weights) weights are restored, those of the largest |s - p| / |p| (s
tuned, p base; docs/methods.md: arXiv 2509.16596); of equal changes at the threshold the first in file order.
Trade-off: the threshold is exact without sorting: float32 bits of a ratio are ordered like the ratio, so one
streaming pass counts their upper halves, a second the lower halves in the bins that matter, for all
percentages at once; a third writes. Memory is one stretch of `CHUNK` weights, whatever the model's size.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftcore.amounts import counted
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_folder, write_json
from sftcore.log import progress
from sftcore.settings import CHECKSUMS

log = logging.getLogger(__name__)
CHUNK = 2**22  # weights in memory at once: 8 MB in bfloat16, about 100 MB with all that is worked out
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HALF = 16  # bits
HALF_VALUES = 1 << HALF
LAYER = re.compile(r"\.(\d+)\.")
REPORT = "restore.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where a tensor's bytes lie.

    Args:
        file: a safetensors file.
        dtype: of `DTYPES`.
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
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Which weights are restored.

    Args:
        bits: weights whose change, as float32 bits, is above this are restored ...
        ties: ... and of those that equal it the first so many.
    """

    bits: int
    ties: int


def restore(
    base: Path,
    tuned: Path,
    targets: dict[float, Path],
    *,
    finish: Callable[[Path], None] = lambda _: None,
) -> dict[float, dict[str, Any]]:
    """Write one folder for each percentage; see the module's docstring.

    Args:
        targets: percentage of the weights (0 to 100) -> folder to write; none of them exists.
        finish: adds the last file to a folder before it gets its name, such as checksums of what was written.

    Returns:
        content of each restore.json: `{percent, num_weights, num_changed, threshold, num_restored, by_module,
        by_layer}`; the threshold is None where nothing is restored.

    Raises:
        UserInputError: a percentage out of range, a target that exists or lies in one of the folders, folders
            that don't hold the same tensors (all problems at once), or that hold the same weights.
        MissingEnvironmentError: the disk is full.
    """
    _check_request(base, tuned, targets)
    pairs = paired_spans(base, tuned)
    thresholds, num_changed = find_thresholds(pairs, list(targets))
    _check_changed(base, tuned, pairs, list(targets), num_changed)
    reports = {}
    for percent, target in targets.items():
        with atomic_folder(target) as folder:
            shutil.copytree(tuned, folder, dirs_exist_ok=True)
            (folder / CHECKSUMS).unlink(missing_ok=True)  # of the weights that were copied
            about = _report(percent, pairs, thresholds[percent], num_changed)
            reports[percent] = about | _write(pairs, folder, thresholds[percent])
            write_json(folder / REPORT, reports[percent])
            finish(folder)
    return reports


def _check_request(base: Path, tuned: Path, targets: dict[float, Path]) -> None:
    problems = [
        Problem(what="a percentage of weights", where="--fraction", got=f"{percent:g}", allowed="0 to 100")
        for percent in targets
        if not 0 <= percent <= 100
    ]
    problems += [
        Problem(what="this folder exists", where=f"--to {target}", remedy="choose another, or delete it")
        for target in targets.values()
        if target.exists()
    ]
    problems += [
        Problem(what=f"this lies in the folder of {option}", where=f"--to {target}", remedy="choose another")
        for target in targets.values()
        for option, folder in (("--base", base), ("--tuned", tuned))
        if not target.exists() and target.resolve().is_relative_to(folder.resolve())
    ]
    if problems:
        raise UserInputError(*problems)


def _check_changed(
    base: Path,
    tuned: Path,
    pairs: dict[str, tuple[Span, Span]],
    percents: Sequence[float],
    num_changed: int,
) -> None:
    """Refuse folders of equal weights; warn where more weights are asked for than changed."""
    asked = _num_wanted(pairs, max(percents))
    if asked and not num_changed:
        what, remedy = "nothing changed: both folders hold the same weights", "give two different models"
        raise UserInputError(Problem(what=what, where=f"{base} and {tuned}", remedy=remedy))
    if asked > num_changed:
        log.warning(
            "%s changed; %g %% asks for %d, so unchanged ones count among those restored",
            counted(num_changed, "weight"),
            max(percents),
            asked,
        )


def _num_wanted(pairs: dict[str, tuple[Span, Span]], percent: float) -> int:
    return round(percent / 100 * sum(span.size for _, span in pairs.values()))


def read_spans(folder: Path) -> dict[str, Span]:
    """The floating-point tensors of a folder's safetensors files, by name.

    The format (github.com/huggingface/safetensors): 8 bytes little-endian header size, a JSON header with
    dtype, shape and data offsets by name, then the data.

    Raises:
        UserInputError: no such files, or a damaged header.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "give a model folder with *.safetensors files (of an adapter: sftcore export --merge first)"
        raise UserInputError(Problem(what="no safetensors files", where=str(folder), remedy=remedy))
    spans = {}
    for file in files:
        for name, entry in _header(file).items():
            if entry["dtype"] in DTYPES:
                spans[name] = Span(
                    file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=entry["start"]
                )
    return spans


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise UserInputError(Problem(what="not a safetensors file", where=str(file))) from error
    if end != file.stat().st_size:
        raise UserInputError(
            Problem(
                what="this safetensors file is cut off",
                where=str(file),
                got=f"{file.stat().st_size} bytes",
                allowed=f"{end} bytes",
            )
        )
    return {n: entry | {"start": 8 + size + entry["data_offsets"][0]} for n, entry in header.items()}


def paired_spans(base: Path, tuned: Path) -> dict[str, tuple[Span, Span]]:
    """Name -> (base, tuned), sorted by name.

    Raises:
        UserInputError: the folders differ in names or shapes; the first differences are named.
    """
    before, after = read_spans(base), read_spans(tuned)
    wrong = sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or before[name].shape != after[name].shape
    )
    if wrong:
        raise UserInputError(
            Problem(
                what=f"{len(wrong)} tensors are not in both folders with the same shape",
                where=f"{base} and {tuned}",
                got=", ".join(wrong[:3]),
                remedy="give the folder that the tuned model was trained from",
            )
        )
    return {name: (before[name], after[name]) for name in sorted(before)}


def find_thresholds(
    pairs: dict[str, tuple[Span, Span]], percents: Sequence[float]
) -> tuple[dict[float, Threshold], int]:
    """The exact threshold of each percentage, and how many weights changed, by two passes."""
    wanted = {percent: _num_wanted(pairs, percent) for percent in percents}
    upper = _count(pairs, lambda bits: np.bincount(bits >> HALF, minlength=HALF_VALUES), "counting")
    bins = {percent: _bin_of(upper, count) for percent, count in wanted.items()}
    needed = sorted({0, *(bin_ for bin_, _ in bins.values())})  # 0 holds the unchanged
    lower = _count(pairs, lambda bits: _lower_counts(bits, needed), "counting again")
    rows = dict(zip(needed, lower, strict=True))
    found = {}
    for percent, (bin_, left) in bins.items():
        value, ties = _bin_of(rows[bin_], left)
        found[percent] = Threshold(bits=(bin_ << HALF) | value, ties=ties)
    return found, int(upper.sum() - rows[0][0])


def _lower_counts(bits: np.ndarray, bins: Sequence[int]) -> np.ndarray:
    """(len(bins), 2^16): how often each lower half occurs under these upper halves."""
    halves = [bits[bits >> HALF == bin_] & (HALF_VALUES - 1) for bin_ in bins]
    return np.stack([np.bincount(half, minlength=HALF_VALUES) for half in halves])


def _bin_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest lies, and how many of it are still wanted there.

    >>> _bin_of(np.array([5, 2, 3]), 4)  # the 3 of bin 2, and 1 of bin 1
    (1, 1)
    >>> _bin_of(np.array([5, 2, 3]), 0)
    (2, 0)
    """
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, wanted))
    bin_ = len(counts) - 1 - place
    return bin_, wanted - int(from_top[place] - counts[bin_])


def _count(
    pairs: dict[str, tuple[Span, Span]], count: Callable[[np.ndarray], np.ndarray], label: str
) -> np.ndarray:
    total: np.ndarray | int = 0
    with progress(f"{label} (tensors)", len(pairs)) as advance:
        for base, tuned in pairs.values():
            for p, s, _ in _stretches(base, tuned, tuned.file):
                total = total + count(change_bits(p, s))
            advance(1)
    return np.asarray(total)


def change_bits(p: torch.Tensor, s: torch.Tensor) -> np.ndarray:
    """Relative changes |s - p| / |p| in float32, as the integers that their bits make, in the same order.

    A weight that left 0 changed infinitely, one that stayed didn't; a NaN counts above everything.
    """
    before, after = p.float(), s.float()
    ratio = torch.where(before == after, 0.0, ((after - before) / before).abs())
    return ratio.numpy().view(np.uint32).astype(np.int64)


def _stretches(base: Span, tuned: Span, file: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Base and tuned weights of a tensor, stretch by stretch, and the offset of the tuned ones in `file`."""
    with open(base.file, "rb") as first, open(file, "rb") as second:
        for begin in range(0, base.size, CHUNK):
            count = min(CHUNK, base.size - begin)
            p, _ = _read(first, base, begin, count)
            s, offset = _read(second, tuned, begin, count)
            yield p, s, offset


def _read(handle: Any, span: Span, begin: int, count: int) -> tuple[torch.Tensor, int]:
    dtype = DTYPES[span.dtype]
    offset = span.start + begin * dtype.itemsize
    handle.seek(offset)
    return torch.frombuffer(bytearray(handle.read(count * dtype.itemsize)), dtype=dtype), offset


def _write(pairs: dict[str, tuple[Span, Span]], folder: Path, threshold: Threshold) -> dict[str, Any]:
    """Put the chosen weights of the copied files back; returns what was restored where."""
    ties = threshold.ties
    by_module: Counter[str] = Counter()
    by_layer: Counter[str] = Counter()
    with progress("restoring (tensors)", len(pairs)) as advance:
        for name, (base, tuned) in pairs.items():
            restored, ties = _restore_tensor(base, tuned, folder / tuned.file.name, threshold.bits, ties)
            by_module[module_type(name)] += restored
            layer = LAYER.search(name)
            by_layer[layer[1] if layer else "none"] += restored
            advance(1)
    return {"num_restored": by_module.total(), "by_module": by_module, "by_layer": by_layer}


def _restore_tensor(base: Span, tuned: Span, file: Path, above: int, ties: int) -> tuple[int, int]:
    """Restore one tensor in `file`; returns how many weights that were, and the ties left for later ones."""
    restored = 0
    for p, s, offset in _stretches(base, tuned, file):
        bits = change_bits(p, s)
        chosen = bits > above
        equal = np.flatnonzero(bits == above)[:ties]
        chosen[equal] = True
        ties -= len(equal)
        if chosen.any():
            restored += int(chosen.sum())
            mixed = torch.where(torch.from_numpy(chosen), p.to(s.dtype), s)
            with open(file, "r+b") as handle:
                handle.seek(offset)
                handle.write(mixed.view(torch.uint8).numpy().tobytes())
    return restored, ties


def module_type(name: str) -> str:
    """What kind of module a weight belongs to.

    >>> module_type("model.layers.3.mlp.up_proj.weight"), module_type("model.norm.weight")
    ('up_proj', 'norm')
    """
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _report(
    percent: float, pairs: dict[str, tuple[Span, Span]], threshold: Threshold, num_changed: int
) -> dict[str, Any]:
    ratio = float(np.uint32(threshold.bits).view(np.float32))
    shown = ratio if np.isfinite(ratio) else str(ratio)
    return {
        "percent": percent,
        "num_weights": sum(span.size for _, span in pairs.values()),
        "num_changed": num_changed,
        "threshold": shown if _num_wanted(pairs, percent) else None,
    }
