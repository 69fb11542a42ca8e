"""A rank's share of a step: which packs it runs, as batches, each with its dropout seed.

In: a schedule, a store, a step. Out: `Batch`es of this rank, as many as on every other.
Invariant: a pack's weights and seed depend on the step and the pack alone, not on the rank that runs it.
Trade-off: batches are collated just before they run: about 0.1 ms a pack, against 100 ms and more to compute
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftcore import dist
from sftcore.batching.collate import Batch, collate
from sftcore.batching.dealing import IDLE
from sftcore.batching.packing import IntArray
from sftcore.batching.schedule import Schedule, Step
from sftcore.config import Recipe
from sftcore.data.store import TokenStore


@dataclass(frozen=True, slots=True)
class Divisors:
    """What a loss is divided by: the trained tokens and the samples that it is the mean over."""

    num_trained_tokens: int
    num_samples: int


def rank_batches(
    recipe: Recipe, schedule: Schedule, store: TokenStore, step: Step, divisors: Divisors | None = None
) -> tuple[list[Batch], list[int]]:
    """This rank's packs of a step, and a dropout seed for each.

    A rank without work in a micro-batch runs the step's smallest pack with zero weights.

    Args:
        divisors: of a mean over more than this step; None: the step's own.
    """
    divisors = divisors or Divisors(step.num_trained_tokens, step.num_samples)
    dealt = schedule.deal(step)[dist.rank()]
    smallest = min(range(len(step.packs)), key=lambda p: int(schedule.lengths[step.packs[p]].sum()))
    batches = [
        collate(
            [store[int(i)] for i in step.packs[smallest if p == IDLE else p]],
            normalise=recipe.train.normalise,
            num_trained_in_step=divisors.num_trained_tokens,
            num_samples_in_step=divisors.num_samples,
            idle=bool(p == IDLE),
        )
        for p in dealt
    ]
    return batches, pack_seeds(recipe.training_seed, step, dealt)


def pack_seeds(seed: int, step: Step, packs: Sequence[int] | np.ndarray) -> list[int]:
    """A 32-bit seed per pack from (seed, epoch, step, pack): dropout needs no saved state, nor the rank.

    Where packs are cut for the ranks that there are (`samples_per_step`), so are dropout's masks.
    """
    return [
        int(np.random.SeedSequence([seed, step.epoch, step.number, int(p) + 1]).generate_state(1)[0])
        for p in packs
    ]


def weightless_batch(store: TokenStore, samples: IntArray) -> Batch:
    """A pack that costs what it costs and trains nothing."""
    return collate(
        [store[int(i)] for i in samples],
        normalise="token",
        num_trained_in_step=1,
        num_samples_in_step=len(samples),
        idle=True,
    )
