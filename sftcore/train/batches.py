"""A rank's share of a step: which packs it runs, as batches, each with its dropout seed.

In: a schedule, a store, a step. Out: `Batch`es of this rank, as many as on every other.
Invariant: a pack's weights and seed depend on the step and the pack alone, not on the rank that runs it.
Trade-off: batches are collated just before they run: about 0.1 ms a pack, against 100 ms and more to compute
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sftcore import dist
from sftcore.batching.collate import Batch, collate
from sftcore.batching.dealing import IDLE
from sftcore.batching.packing import IntArray
from sftcore.batching.schedule import Schedule, Step
from sftcore.data.store import TokenStore

NUMBER = "number"  # extra column: of each document's sample in the store
PACKS_PER_RANK = 4  # collated at a time, of an evaluation


@dataclass(frozen=True, slots=True)
class Divisors:
    """What a loss is divided by: the trained tokens and the samples that it is the mean over."""

    num_trained_tokens: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSource:
    """What the batches of steps are made from.

    Args:
        seed: of dropout.
        normalise: what a step's loss is the mean over.
    """

    schedule: Schedule
    store: TokenStore
    seed: int
    normalise: Literal["token", "sample"] = "token"


def whole_set(
    store: TokenStore, *, capacity: int, seed: int, normalise: Literal["token", "sample"]
) -> PackSource:
    """Every sample of a store once, in packs that don't depend on the number of ranks, to be evaluated."""
    schedule = Schedule(
        lengths=store.lengths,
        num_trained=store.num_trained,
        capacity=capacity,
        seed=seed,
        epochs=1,
        world=dist.world_size(),
        tokens_per_step=capacity * PACKS_PER_RANK * dist.world_size(),
    )
    return PackSource(schedule=schedule, store=store, seed=seed, normalise=normalise)


def all_batches(source: PackSource) -> Iterator[Batch]:
    """This rank's packs of all steps, a few at a time, weighted so that their losses are the mean of all."""
    everything = Divisors(int(source.store.num_trained.sum()), len(source.store))
    for number in range(source.schedule.num_steps):
        yield from rank_batches(source, source.schedule.step(number), everything)[0]


def rank_batches(
    source: PackSource, step: Step, divisors: Divisors | None = None
) -> tuple[list[Batch], list[int]]:
    """This rank's packs of a step, and a dropout seed for each.

    A rank without work in a micro-batch runs the step's smallest pack with zero weights.

    Args:
        divisors: of a mean over more than this step; None: the step's own.
    """
    schedule = source.schedule
    divisors = divisors or Divisors(step.num_trained_tokens, step.num_samples)
    dealt = schedule.deal(step)[dist.rank()]
    smallest = min(range(len(step.packs)), key=lambda p: int(schedule.lengths[step.packs[p]].sum()))
    batches = [
        _batch_of(source, step.packs[smallest if p == IDLE else p], divisors, idle=bool(p == IDLE))
        for p in dealt
    ]
    return batches, pack_seeds(source.seed, step, dealt)


def pack_seeds(seed: int, step: Step, packs: Sequence[int] | np.ndarray) -> list[int]:
    """A 32-bit seed per pack from (seed, epoch, step, pack): dropout needs no saved state, nor the rank.

    Where packs are cut for the ranks that there are (`samples_per_step`), so are dropout's masks.
    """
    return [
        int(np.random.SeedSequence([seed, step.epoch, step.number, int(p) + 1]).generate_state(1)[0])
        for p in packs
    ]


def weightless_batch(source: PackSource, samples: IntArray) -> Batch:
    """A pack that costs what it costs and trains nothing."""
    return _batch_of(source, samples, Divisors(1, len(samples)), idle=True)


def _batch_of(source: PackSource, samples: IntArray, divisors: Divisors, *, idle: bool) -> Batch:
    found = [source.store[int(i)] for i in samples]
    numbered = [
        replace(sample, extra={**sample.extra, NUMBER: np.array([number])})
        for sample, number in zip(found, samples, strict=True)
    ]
    return collate(
        numbered,
        normalise=source.normalise,
        num_trained_in_step=divisors.num_trained_tokens,
        num_samples_in_step=divisors.num_samples,
        idle=idle,
    )
