"""Dealing: packs of a step -> which rank runs which of them when; and steps cut so that this comes out even.

In: predicted costs of packs or samples, the number of ranks. Out: a table of pack numbers, or packs.
Invariant: every pack is dealt once, each sample is in one pack, none is over capacity.
Trade-off: a step of so many samples is cut into as many packs for every rank, if need be smaller ones than
best fit makes: with 9 packs on 8 ranks one rank would compute while seven wait, half of the step. At 8 ranks
and a heavy tail that leaves 0.3 % waiting (`benchmarks/balance.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sftcore.batching.packing import IntArray

IDLE = -1  # in a dealing: this rank has no pack in this micro-batch
SWAPS_PER_RANK = 2  # at most, when evening out a dealing
SWAP_GAIN = 1e-6  # of the most expensive rank's cost; smaller gains are rounding
WAITING_ALLOWED = 0.01  # of the mean rank's cost, before a step is cut into more packs
TIE_BREAK = 1e-6  # weight of a pack's own cost among packs of one rank
Costs = npt.NDArray[np.float64]


def deal(costs: npt.ArrayLike, *, world: int) -> IntArray:
    """Deal packs to ranks and micro-batches so that both the ranks' sums and the micro-batches are even.

    Packs are sorted by cost; each run of `world` packs is one micro-batch (so ranks that wait for each other
    in every micro-batch wait little), and in it the rank with the least cost so far takes the most expensive
    pack. Then the rank with the highest cost swaps packs with others as long as that lowers its sum below the
    highest so far.

    >>> deal([5.0, 1.0, 4.0, 2.0], world=2)
    array([[0, 1],
           [2, 3]])

    Returns:
        (world, num_micro_batches) int64: number of a pack, or IDLE; each rank's largest pack (by cost) first.
    """
    costs = np.asarray(costs, np.float64)
    num_micro_batches = -(-len(costs) // world)
    order = np.argsort(-costs, kind="stable")
    dealt = np.full((world, num_micro_batches), IDLE, np.int64)
    sums = np.zeros(world)
    for m in range(num_micro_batches):
        batch = order[m * world : (m + 1) * world]
        ranks = np.argsort(sums, kind="stable")[: len(batch)]
        dealt[ranks, m] = batch
        sums[ranks] += costs[batch]
    return _swapped(dealt, np.append(costs, 0.0))


def _swapped(dealt: IntArray, costs: Costs) -> IntArray:
    """Lower the most expensive rank's sum by swaps; costs[IDLE] is 0."""
    table = costs[dealt]  # (world, num_micro_batches)
    for _ in range(SWAPS_PER_RANK * len(dealt)):
        sums = table.sum(1)
        costliest = int(np.argmax(sums))
        moved = table[costliest][:, None, None] - table[None]  # (own slot, other rank, its slot)
        higher = np.maximum(sums[costliest] - moved, sums[None, :, None] + moved)
        higher[:, costliest] = np.inf
        own, rank, slot = np.unravel_index(int(np.argmin(higher)), higher.shape)
        if higher[own, rank, slot] >= sums[costliest] * (1 - SWAP_GAIN):
            break
        for grid in (dealt, table):
            grid[costliest, own], grid[rank, slot] = grid[rank, slot], grid[costliest, own]
    by_cost = np.argsort(-table, axis=1, kind="stable")
    return np.take_along_axis(dealt, by_cost, axis=1)


def cut_evenly(
    packs: list[IntArray], lengths: IntArray, costs: Costs, *, capacity: int, world: int
) -> list[IntArray]:
    """Cut a step into as many packs for each rank (or one for each sample), evenly loaded.

    Args:
        packs: the fewest packs, as indices into `lengths`.
        lengths: (num_samples,) tokens.
        costs: (num_samples,) predicted.

    Returns:
        indices into `lengths`, pack by pack: the first way that lets ranks wait little, or else one that
        no later way is much more even than.
    """
    fewest = min(-(-len(packs) // world) * world, len(lengths))
    more = min(fewest + world, len(lengths))
    ways: list[Callable[[], list[IntArray]]] = [
        lambda: _cut(packs, fewest, costs),
        lambda: _spread(lengths, costs, fewest, capacity=capacity, world=world),
        lambda: _spread(lengths, costs, more, capacity=capacity, world=world),
    ]
    best, least = packs, np.inf
    for way in ways:
        if least > WAITING_ALLOWED and (parts := way()):
            waiting = _waiting([float(costs[part].sum()) for part in parts], world)
            if waiting < least - WAITING_ALLOWED:
                best, least = parts, waiting
    return best


def _spread(lengths: IntArray, costs: Costs, num_packs: int, *, capacity: int, world: int) -> list[IntArray]:
    """Cut a step into packs that can be dealt evenly.

    The most expensive sample goes to the rank with least so far, there to the cheapest pack; or to the next
    that has room.

    Args:
        lengths: (num_samples,) tokens.
        costs: (num_samples,) predicted.

    Returns:
        indices into `lengths`, pack by pack; nothing where a sample found no room.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    rank = np.arange(num_packs) % world
    of_pack, of_rank, room = np.zeros(num_packs), np.zeros(world), np.full(num_packs, capacity)
    for i in np.argsort(-costs, kind="stable"):
        load = of_rank[rank] + TIE_BREAK * of_pack
        target = int(np.argmin(np.where(room >= lengths[i], load, np.inf)))
        if room[target] < lengths[i]:
            return []
        packs[target].append(int(i))
        of_pack[target] += costs[i]
        of_rank[rank[target]] += costs[i]
        room[target] -= lengths[i]
    return [np.array(members, np.int64) for members in packs]


def _cut(packs: list[IntArray], wanted: int, costs: Costs) -> list[IntArray]:
    """Cut packs in two until there are `wanted`, always the most expensive that holds several samples."""
    parts = list(packs)
    while len(parts) < wanted:
        costliest = max(range(len(parts)), key=lambda p: costs[parts[p]].sum() if len(parts[p]) > 1 else -1.0)
        whole = parts.pop(costliest)
        parts += [whole[::2], whole[1::2]]
    return parts


def _waiting(costs: list[float], world: int) -> float:
    """By how much the most expensive rank exceeds the mean, once packs of these costs are dealt."""
    loads = np.append(costs, 0.0)[deal(costs, world=world)].sum(1)
    return float(loads.max() / loads.mean() - 1)
