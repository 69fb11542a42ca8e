"""Which samples an epoch holds when sources are mixed by weight or temperature.

In: the source of each sample, each source's samples per epoch, seed, epoch. Out: sample numbers, some perhaps
several times.
Invariant: a pure function, so resume and every rank agree; over any number of epochs two samples of a source
are used equally often, give or take one.
Trade-off: each source is a stream of shuffles end to end, of which every epoch takes the next stretch, so the
same sample may come twice in an epoch before another of its source comes three times; drawing with
replacement would need no stream, and leave 37 % of a source unseen in its first pass.

    source of 3, 2 an epoch      |b a c|c b a|a c b| ...   shuffles, one a lap
    epochs                        0 0 1 1 2 2 3 3
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sftcore.batching.packing import IntArray

STREAM = 0x6D6978  # keeps these shuffles apart from those of the epochs


def temperature_shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """n^(1/T) of each source, as shares of 1 (arXiv 1907.05019, section 4.2).

    >>> temperature_shares([1, 9], 2.0)
    [0.25, 0.75]
    """
    powers = [size ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def samples_per_epoch(num_samples: int, weights: Sequence[float]) -> list[int]:
    """`num_samples` split in proportion to `weights` (largest remainders), but at least 1 each.

    >>> samples_per_epoch(10, [3, 1, 1])
    [6, 2, 2]
    """
    exact = np.asarray(weights, float) / sum(weights) * num_samples
    counts = np.floor(exact).astype(int)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: num_samples - counts.sum()]] += 1
    return [max(1, int(count)) for count in counts]


def draw_epoch(sources: IntArray, counts: Sequence[int], *, seed: int, epoch: int) -> IntArray:
    """Sample numbers of one epoch, source after source.

    Args:
        sources: (num_samples,) source of each sample.
        counts: samples of each source in an epoch; each source has some.

    Returns:
        (sum(counts),) int64.
    """
    drawn = []
    for source, count in enumerate(counts):
        members = np.flatnonzero(sources == source)
        places = np.arange(epoch * count, (epoch + 1) * count)
        for lap in np.unique(places // len(members)).tolist():
            order = np.random.default_rng([seed, STREAM, source, lap]).permutation(len(members))
            drawn.append(members[order[places[places // len(members) == lap] % len(members)]])
    return np.concatenate(drawn)
