"""Restoring parameters: the weights that fine-tuning changed most, relatively, go back to their base values.

In: a base folder, a tuned folder of the same architecture, percentages. Out: for each percentage a folder
like the tuned one with that share of its weights restored, and restore.json with what was restored where.
Invariant: exactly round(percent/100 * weights) weights are restored, those of the largest |s - p| / |p| (s
tuned, p base; docs/methods.md: arXiv 2509.16596); of equal changes at the threshold the first in file order.
Trade-off: the threshold is exact without sorting: float32 bits of a ratio are ordered like the ratio, so one
streaming pass counts their upper halves, a second the lower halves in the bins that matter, for all
percentages at once; a third writes. Memory is one stretch of weights, whatever the model's size.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sftcore.amounts import counted
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import write_json
from sftcore.log import progress
from sftcore.model.weights import Span, aligned, change_weights, model_folder, stretches

log = logging.getLogger(__name__)
HALF = 16  # bits
HALF_VALUES = 1 << HALF
LAYER = re.compile(r"\.(\d+)\.")
REPORT = "restore.json"
Pairs = Mapping[str, tuple[Span, ...]]  # name -> where its tuned and its base weights are


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Which weights are restored.

    Args:
        bits: weights whose change, as float32 bits, is above this are restored ...
        ties: ... and of those that equal it the first so many.
    """

    bits: int
    ties: int


def restore(base: Path, tuned: Path, targets: dict[float, Path]) -> dict[float, dict[str, Any]]:
    """Write one folder for each percentage; see the module's docstring.

    Args:
        targets: percentage of the weights (0 to 100) -> folder to write; none of them exists.

    Returns:
        content of each restore.json: `{percent, num_weights, num_changed, threshold, num_restored, by_module,
        by_layer}`; the threshold is None where nothing is restored.

    Raises:
        UserInputError: a percentage out of range, a target that exists or lies in one of the folders, folders
            that don't hold the same tensors (all problems at once), or that hold the same weights.
        MissingEnvironmentError: the disk is full.
    """
    _check_request(base, tuned, targets)
    pairs: Pairs = {name: (s, p) for name, (p, s) in aligned([base, tuned]).items()}
    thresholds, num_changed = find_thresholds(pairs, list(targets))
    _check_changed(base, tuned, pairs, list(targets), num_changed)
    reports = {}
    for percent, target in targets.items():
        with model_folder(target, like=tuned) as folder:
            restoring = _Restoring(above=thresholds[percent].bits, ties=thresholds[percent].ties)
            change_weights(pairs, folder, restoring, label="restoring")
            reports[percent] = _report(percent, pairs, thresholds[percent], num_changed) | restoring.counts()
            write_json(folder / REPORT, reports[percent])
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
    base: Path, tuned: Path, pairs: Pairs, percents: Sequence[float], num_changed: int
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


def _num_wanted(pairs: Pairs, percent: float) -> int:
    return round(percent / 100 * sum(span.size for span, _ in pairs.values()))


def find_thresholds(pairs: Pairs, percents: Sequence[float]) -> tuple[dict[float, Threshold], int]:
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


def _count(pairs: Pairs, count: Callable[[np.ndarray], np.ndarray], label: str) -> np.ndarray:
    total: np.ndarray | int = 0
    with progress(f"{label} (tensors)", len(pairs)) as advance:
        for spans in pairs.values():
            for _, (s, p) in stretches(spans):
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


@dataclass(slots=True, kw_only=True)
class _Restoring:
    """Puts the chosen weights of tensors back, in their order, and counts them.

    Args:
        above: as `Threshold.bits`.
        ties: those that are left for later tensors.
        by_module: how many were restored, by kind of module ...
        by_layer: ... and by number of the layer.
    """

    above: int
    ties: int
    by_module: Counter[str] = field(default_factory=Counter)
    by_layer: Counter[str] = field(default_factory=Counter)

    def __call__(self, name: str, tuned_and_base: Sequence[torch.Tensor]) -> torch.Tensor:
        """A stretch of tuned weights with the chosen ones as in the base."""
        s, p = tuned_and_base
        bits = change_bits(p, s)
        chosen = bits > self.above
        equal = np.flatnonzero(bits == self.above)[: self.ties]
        chosen[equal] = True
        self.ties -= len(equal)
        layer = LAYER.search(name)
        self.by_module[module_type(name)] += int(chosen.sum())
        self.by_layer[layer[1] if layer else "none"] += int(chosen.sum())
        return torch.where(torch.from_numpy(chosen), p.to(s.dtype), s) if chosen.any() else s

    def counts(self) -> dict[str, Any]:
        """What was restored where."""
        counted = {"by_module": self.by_module, "by_layer": self.by_layer}
        return {"num_restored": self.by_module.total(), **counted}


def module_type(name: str) -> str:
    """What kind of module a weight belongs to.

    >>> module_type("model.layers.3.mlp.up_proj.weight"), module_type("model.norm.weight")
    ('up_proj', 'norm')
    """
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _report(percent: float, pairs: Pairs, threshold: Threshold, num_changed: int) -> dict[str, Any]:
    ratio = float(np.uint32(threshold.bits).view(np.float32))
    shown = ratio if np.isfinite(ratio) else str(ratio)
    return {
        "percent": percent,
        "num_weights": sum(span.size for span, _ in pairs.values()),
        "num_changed": num_changed,
        "threshold": shown if _num_wanted(pairs, percent) else None,
    }
