"""Packing: sample lengths -> packs of at most `capacity` tokens, best-fit-decreasing over the histogram.

In: lengths in tokens, a capacity, a seed. Out: `Packs`, a partition of the samples.
Invariant: each sample is in exactly one pack, no pack is over capacity, the same seed gives the same packs.
Trade-off: samples of equal length are interchangeable, so all of one length are placed with a few array
operations: 10 million rows take seconds instead of hours, at the price of a fixed pattern of lengths per
pack (which samples fill the pattern is random, so packs are new every epoch).

Best-fit-decreasing needs at most 11/9 of the optimal number of packs plus 4 (D. S. Johnson, "Near-optimal
bin packing algorithms", MIT, 1973); on real instruction lengths it reaches the optimum.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """A partition of samples into packs.

    Pack p holds the samples `indices[offsets[p]:offsets[p + 1]]`:

    >>> packs = pack(np.array([3, 1, 2, 4]), capacity=5, seed=0)
    >>> sorted(sorted(packs[p].tolist()) for p in range(len(packs)))
    [[0, 2], [1, 3]]

    Args:
        indices: (num_samples,) int64, sample numbers, pack after pack.
        offsets: (num_packs + 1,) int64, where each pack begins in `indices`.
    """

    indices: IntArray
    offsets: IntArray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> IntArray:
        return self.indices[self.offsets[number] : self.offsets[number + 1]]


def pack(lengths: npt.ArrayLike, *, capacity: int, seed: int) -> Packs:
    """Partition samples into packs of at most `capacity` tokens; packs come in random order.

    Args:
        lengths: (num_samples,) tokens in each sample, 1..capacity.
        capacity: tokens in a pack at most.
        seed: decides which of equally long samples goes where, and the order of the packs.

    Raises:
        ValueError: a length is below 1 or over capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return Packs(indices=np.empty(0, np.int64), offsets=np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    rng = np.random.default_rng(seed)
    pack_of_slot, num_packs = _best_fit_decreasing(np.bincount(lengths), capacity)
    shuffled = rng.permutation(len(lengths))
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    pack_of_slot = rng.permutation(num_packs)[pack_of_slot]
    by_pack = np.argsort(pack_of_slot, kind="stable")
    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of_slot, minlength=num_packs), out=offsets[1:])
    return Packs(indices=longest_first[by_pack], offsets=offsets)


def _best_fit_decreasing(histogram: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Pack number of each slot, slots being the samples from longest to shortest; and the number of packs.

    Best fit puts a sample of length L where the least room >= L is left. That pack's room shrinks, so it
    stays the best fit until it holds floor(room / L) of them; packs with equal room are filled alike, one
    group at a time.

    Args:
        histogram: (max_length + 1,) number of samples of each length.
    """
    rooms: list[int] = []  # ascending rooms for which `packs_with` has packs
    packs_with: dict[int, list[IntArray]] = {}
    slots: list[IntArray] = []
    num_packs = 0

    def leave(room: int, packs: IntArray) -> None:
        if room > 0 and len(packs):
            if room not in packs_with:
                bisect.insort(rooms, room)
            packs_with.setdefault(room, []).append(packs)

    for length in np.flatnonzero(histogram)[::-1].tolist():
        remaining = int(histogram[length])
        for room in rooms[bisect.bisect_left(rooms, length) :]:
            if not remaining:
                break
            packs = np.concatenate(packs_with.pop(room))
            del rooms[bisect.bisect_left(rooms, room)]
            used = _fill(packs, room // length, remaining, slots)
            remaining -= min(remaining, len(packs) * (room // length))
            for rest, some in _rooms_after(packs, room, length, used):
                leave(rest, some)
        if remaining:
            each = capacity // length
            new = np.arange(num_packs, num_packs + -(-remaining // each))
            num_packs += len(new)
            used = _fill(new, each, remaining, slots)
            for rest, some in _rooms_after(new, capacity, length, used):
                leave(rest, some)
    return np.concatenate(slots), num_packs


def _fill(packs: IntArray, each: int, remaining: int, slots: list[IntArray]) -> tuple[int, int]:
    """Give `each` samples to packs in turn until `remaining` is used up; append one slot per sample.

    Returns:
        number of packs that took `each`, and how many samples the next one took (0: none).
    """
    full, partial = min(len(packs), remaining // each), 0
    if full < len(packs):
        partial = remaining - full * each
    slots.append(np.repeat(packs[:full], each))
    slots.append(np.repeat(packs[full : full + 1], partial))
    return full, partial


def _rooms_after(
    packs: IntArray, room: int, length: int, used: tuple[int, int]
) -> list[tuple[int, IntArray]]:
    """Room that is left in the packs that `_fill` filled, partly filled, and did not touch."""
    full, partial = used
    touched = full + (1 if partial else 0)
    return [
        (room - (room // length) * length, packs[:full]),
        (room - partial * length, packs[full:touched]),
        (room, packs[touched:]),
    ]
