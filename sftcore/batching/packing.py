"""Packing: sample lengths -> packs of at most `capacity` tokens, nearly full, and new for every seed.

In: lengths in tokens, a capacity, a seed. Out: `Packs`, a partition of the samples.
Invariant: each sample is in exactly one pack, no pack is over capacity, the same seed gives the same packs,
and there are never more packs than best-fit-decreasing makes.
Trade-off: best-fit-decreasing alone puts samples of like length together, epoch after epoch (two samples
that share a pack would do so again 120 times as often as chance on Alpaca's lengths at 4,096). So most
short samples are dealt at random first, and best fit only closes the rest of each pack: about chance, for
twice the time.

Best-fit-decreasing needs at most 11/9 of the optimal number of packs plus 4 (D. S. Johnson, "Near-optimal
bin packing algorithms", MIT, 1973); on real instruction lengths both ways reach the optimum. Samples of
equal length are interchangeable, so all of one length are placed with a few array operations.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
AnyInts = npt.NDArray[np.integer[Any]]
SHORT_SHARE = 8  # samples up to capacity / 8 are dealt at random
RESERVED_SHARES = (8, 3)  # 1 / these of the capacity is kept for best fit; the next one if one does not do
_NO_ROOMS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """A partition of samples into packs.

    Pack p holds the samples `indices[offsets[p]:offsets[p + 1]]`, longest first:

    >>> packs = pack(np.array([3, 1, 2, 4]), capacity=5, seed=0)
    >>> sorted(packs[p].tolist() for p in range(len(packs)))
    [[0, 2], [3, 1]]

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
        seed: decides which samples share a pack, and the order of the packs.

    Raises:
        ValueError: a length is below 1 or over capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return Packs(indices=np.empty(0, np.int64), offsets=np.zeros(1, np.int64))
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must be in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    rng = np.random.default_rng(seed)
    samples, pack_of, num_packs = _assign(lengths, capacity, rng)
    pack_of = rng.permutation(num_packs)[pack_of]
    longest = int(lengths.max())
    order = _stable_order(pack_of * np.int64(longest + 1) + (longest - lengths[samples]))
    offsets = np.zeros(num_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=num_packs), out=offsets[1:])
    return Packs(indices=samples[order].astype(np.int64), offsets=offsets)


def constant_num_packs(lengths: IntArray, *, capacity: int) -> int | None:
    """How many packs any seed gives: known where best fit needs no more than there must be; else None.

    There must be ceil(tokens / capacity), and one for each sample of more than half the capacity.

    >>> [constant_num_packs(np.array(lengths), capacity=7) for lengths in ([3, 1, 2, 6], [3, 3, 3, 3, 2])]
    [2, None]
    """
    fewest = _best_fit(np.bincount(lengths), capacity, _NO_ROOMS)[1]
    needed = max(-(-int(lengths.sum()) // capacity), int((2 * lengths > capacity).sum()))
    return fewest if fewest == needed else None


def _stable_order(keys: IntArray) -> IntArray:
    """Stable argsort of non-negative integers, 16 bits at a time: numpy sorts uint16 by radix, in O(n)."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    for shift in range(16, int(keys.max(initial=0)).bit_length(), 16):
        digits = (keys[order] >> shift & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits, kind="stable")]
    return order


def _assign(lengths: IntArray, capacity: int, rng: np.random.Generator) -> tuple[AnyInts, IntArray, int]:
    """All samples in some order, the pack of each, and the number of packs; mixed if that costs no pack."""
    shuffled = rng.permutation(len(lengths)).astype(np.int32)
    optimum = -(-int(lengths.sum()) // capacity)
    mixed = _assign_mixed(lengths, shuffled, capacity, optimum, capacity // RESERVED_SHARES[0])
    if mixed[2] == optimum:
        return mixed
    plain, fewest = _best_fit(np.bincount(lengths), capacity, _NO_ROOMS)
    for share in RESERVED_SHARES:
        mixed = _assign_mixed(lengths, shuffled, capacity, fewest, capacity // share)
        if mixed[2] <= fewest:
            return mixed
    return _longest_first(lengths, shuffled), plain, fewest


def _assign_mixed(
    lengths: IntArray, shuffled: AnyInts, capacity: int, num_packs: int, reserved: int
) -> tuple[AnyInts, IntArray, int]:
    """Best fit for long samples; short ones at random while there is ample room; best fit for the rest."""
    shuffled_lengths = lengths[shuffled]
    is_long = shuffled_lengths > capacity // SHORT_SHARE
    long, short, short_lengths = shuffled[is_long], shuffled[~is_long], shuffled_lengths[~is_long]
    long = _longest_first(lengths, long)
    packs_of_long, used = _best_fit(np.bincount(lengths[long]), capacity, _NO_ROOMS)
    rooms = np.full(max(num_packs, used), capacity, np.int64)
    np.subtract.at(rooms, packs_of_long, lengths[long])
    packs_of_dealt = _deal_at_random(short_lengths, rooms, max(reserved, capacity // SHORT_SHARE))
    dealt, rest = short[: len(packs_of_dealt)], _longest_first(lengths, short[len(packs_of_dealt) :])
    packs_of_rest, num_packs = _best_fit(np.bincount(lengths[rest]), capacity, rooms)
    pack_of = np.concatenate([packs_of_long, packs_of_dealt, packs_of_rest])
    return np.concatenate([long, dealt, rest]), pack_of, num_packs


def _deal_at_random(short_lengths: IntArray, rooms: IntArray, enough: int) -> IntArray:
    """Give packs with more than `enough` room one of the (shuffled) short samples each, round after round.

    Args:
        rooms: (num_packs,) tokens left in each; lowered in place.

    Returns:
        packs of the first samples; the others were not dealt.
    """
    packs: list[IntArray] = [np.empty(0, np.int64)]
    start = 0
    while start < len(short_lengths):
        open_packs = np.flatnonzero(rooms > enough)[: len(short_lengths) - start]
        if not len(open_packs):
            break
        rooms[open_packs] -= short_lengths[start : start + len(open_packs)]
        packs.append(open_packs)
        start += len(open_packs)
    return np.concatenate(packs)


def _longest_first(lengths: IntArray, samples: AnyInts) -> AnyInts:
    own = lengths[samples]
    return samples[_stable_order(own.max(initial=0) - own)]


def _best_fit(histogram: IntArray, capacity: int, given_rooms: IntArray) -> tuple[IntArray, int]:
    """Pack of each sample, from longest to shortest, and the number of packs.

    Best fit puts a sample of length L where the least room >= L is left. That pack's room shrinks, so it
    stays the best fit until it holds floor(room / L) of them; packs with equal room are filled alike, one
    group at a time.

    Args:
        histogram: number of samples of each length.
        given_rooms: (packs that are there already,) tokens left in each; more are opened as needed.
    """
    rooms = _Rooms(given_rooms, capacity)
    for length in np.flatnonzero(histogram)[::-1].tolist():
        rooms.place(length, int(histogram[length]))
    return np.concatenate([np.empty(0, np.int64), *rooms.slots]), rooms.num_packs


class _Rooms:
    """Packs grouped by the room that is left in them."""

    def __init__(self, given_rooms: IntArray, capacity: int) -> None:
        self.capacity = capacity
        self.num_packs = len(given_rooms)
        self.slots: list[IntArray] = []  # pack of each sample placed, in order
        self.packs_with: dict[int, list[IntArray]] = {}
        by_room = np.argsort(given_rooms, kind="stable")
        borders = np.flatnonzero(np.diff(given_rooms[by_room])) + 1
        for packs in np.split(by_room, borders):
            if len(packs) and given_rooms[packs[0]] > 0:
                self.packs_with[int(given_rooms[packs[0]])] = [packs]
        self.rooms = sorted(self.packs_with)  # ascending keys of packs_with

    def place(self, length: int, count: int) -> None:
        """Place `count` samples of one length."""
        for room in self.rooms[bisect.bisect_left(self.rooms, length) :]:
            if not count:
                return
            del self.rooms[bisect.bisect_left(self.rooms, room)]
            count -= self._fill(np.concatenate(self.packs_with.pop(room)), room, length, count)
        if count:
            each = self.capacity // length
            new = np.arange(self.num_packs, self.num_packs - (-count // each))
            self.num_packs += len(new)
            self._fill(new, self.capacity, length, count)

    def _fill(self, packs: IntArray, room: int, length: int, count: int) -> int:
        """Fill packs of equal room one after the other; returns how many samples they took."""
        each = room // length
        full = min(len(packs), count // each)
        partial = count - full * each if full < len(packs) else 0
        touched = full + (1 if partial else 0)
        self.slots += [np.repeat(packs[:full], each), np.repeat(packs[full:touched], partial)]
        self._keep(room - each * length, packs[:full])
        self._keep(room - partial * length, packs[full:touched])
        self._keep(room, packs[touched:])
        return full * each + partial

    def _keep(self, room: int, packs: IntArray) -> None:
        if room > 0 and len(packs):
            if room not in self.packs_with:
                bisect.insort(self.rooms, room)
            self.packs_with.setdefault(room, []).append(packs)
