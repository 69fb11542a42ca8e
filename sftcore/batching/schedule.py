"""The schedule: which samples each step holds, in which packs, and which rank runs each pack when.

In: sample lengths, trained tokens, seed, batch settings, world size. Out: any step of any epoch, by number.
Invariant: what a step holds is a function of (lengths, seed, epoch, batch settings) alone; the world size
only decides who computes it. Every sample is in exactly one step of each epoch, and nothing is dropped; with
`source_counts` an epoch holds the samples of `draw_epoch` instead, each as often as it was drawn. Samples of
one of `units` share a pack.
Trade-off: packs of a step are dealt by predicted cost, which needs all packs of one step (never of the
epoch) in memory: microseconds for hundreds of packs, against about 10 % idle time for random dealing. Where
a step is so many samples, its packs are cut for the ranks that there are: see `batching.dealing`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from sftcore.batching.dealing import cut_evenly, deal
from sftcore.batching.mixture import draw_epoch
from sftcore.batching.packing import IntArray, Packs, constant_num_packs, pack
from sftcore.batching.units import Units, check_units
from sftcore.fsio import fingerprint_of

EPOCHS_SEARCHED = 1000  # for the largest pack: 0.3 s of a few samples
STEPS_SEARCHED = 300  # of an epoch at most, for the largest pack where steps hold several


@dataclass(frozen=True, slots=True, kw_only=True)
class CostCoefficients:
    """Predicted cost of documents: per token, per squared length, per trained token; see `of`.

    Units cancel; `model.cost` gives them in FLOPs.

    Args:
        per_banded_square: of layers with a sliding window.
        window: positions that those see, themselves included.
    """

    per_token: float = 1.0
    per_square: float = 0.0
    per_trained: float = 0.0
    per_banded_square: float = 0.0
    window: int = 0

    def of(self, lengths: IntArray, num_trained: IntArray) -> npt.NDArray[np.float64]:
        """Cost of each document, from its tokens and its trained tokens.

        A causal document has len^2 / 2 pairs, in a band of w positions w len - w^2 / 2.

        >>> CostCoefficients(per_token=0, per_banded_square=1, window=4).of(np.array([3, 10]), np.zeros(2))
        array([ 9., 64.])
        """
        seen = np.minimum(lengths, self.window)
        return np.asarray(
            self.per_token * lengths
            + self.per_square * lengths**2
            + self.per_banded_square * (seen * (2 * lengths - seen))
            + self.per_trained * num_trained,
            np.float64,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimizer step holds; independent of the world size, but for how finely it is cut into packs.

    Args:
        number: 0-based over the whole run.
        epoch: 0-based.
        packs: each (num_samples_in_pack,) int64 sample numbers.
        num_tokens: tokens over all packs, without pads.
        num_trained_tokens: positions with a target, the divisor of the loss when normalised by token.
    """

    number: int
    epoch: int
    packs: tuple[IntArray, ...]
    num_tokens: int
    num_trained_tokens: int

    @property
    def num_samples(self) -> int:
        """Samples in the step, the divisor of the loss when normalised by sample."""
        return sum(len(p) for p in self.packs)

    @property
    def samples(self) -> IntArray:
        """(num_samples,) sample numbers, pack after pack."""
        return np.concatenate(self.packs)


class Schedule:
    """Random access to the steps of a run.

    >>> schedule = Schedule(lengths=[3, 1, 2, 4], num_trained=[1, 1, 1, 1], samples_per_step=3, capacity=8,
    ...                     seed=0, epochs=2, world=1)
    >>> [schedule.step(s).num_samples for s in range(schedule.num_steps)]
    [3, 1, 3, 1]
    """

    def __init__(
        self,
        *,
        lengths: npt.ArrayLike,
        num_trained: npt.ArrayLike,
        capacity: int,
        seed: int,
        epochs: int,
        world: int,
        samples_per_step: int | None = None,
        tokens_per_step: int | None = None,
        cost: CostCoefficients | None = None,
        sources: npt.ArrayLike | None = None,
        source_counts: Sequence[int] | None = None,
        units: npt.ArrayLike | None = None,
    ) -> None:
        """Exactly one of `samples_per_step` and `tokens_per_step` (a multiple of `capacity`).

        Args:
            lengths: (num_samples,) tokens per sample.
            num_trained: (num_samples,) positions with a target per sample.
            capacity: tokens in a pack at most.
            world: number of ranks.
            sources: (num_samples,) source of each sample; None: all of one.
            source_counts: samples of each source in an epoch; None: each sample once.
            units: (num_samples,) number of each sample's unit; None: each is its own.

        Raises:
            UserInputError: a unit is larger than the capacity, or sources are mixed, which parts units.
        """
        assert (samples_per_step is None) != (tokens_per_step is None)
        self.lengths = np.asarray(lengths, np.int64)
        self.num_trained = np.asarray(num_trained, np.int64)
        self.capacity, self.seed, self.epochs, self.world = capacity, seed, epochs, world
        self.samples_per_step = samples_per_step
        self.packs_per_step = tokens_per_step // capacity if tokens_per_step else None
        self.cost = cost or CostCoefficients()
        self.sources = (
            np.zeros(len(self.lengths), np.int64) if sources is None else np.asarray(sources, np.int64)
        )
        self._num_sources = int(self.sources.max(initial=0)) + 1
        self.source_counts = None if source_counts is None else tuple(source_counts)
        self.units = None if units is None else Units(units)
        self._item_lengths = self.lengths  # an item is what is packed as one: a sample, or a unit of several
        if self.units is not None:
            check_units(self.units, self.lengths, capacity, is_mixed=source_counts is not None)
            self._item_lengths = self.units.total(self.lengths)
        self._epoch_packs = lru_cache(maxsize=2)(self._pack_epoch)
        self._epoch_samples = lru_cache(maxsize=2)(self._draw_epoch)
        self._epoch_cuts = lru_cache(maxsize=2)(self._cut_epoch)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return len(self.lengths) if self.source_counts is None else sum(self.source_counts)

    @cached_property
    def first_steps(self) -> IntArray:
        """(epochs + 1,) number of the first step of each epoch; the last entry is `num_steps`."""
        if self.samples_per_step and self.units is not None:
            per_epoch = [len(self._epoch_cuts(epoch)) for epoch in range(self.epochs)]
        elif self.samples_per_step:
            per_epoch = [-(-self.num_samples // self.samples_per_step)] * self.epochs
        else:
            assert self.packs_per_step
            per_epoch = [-(-num_packs // self.packs_per_step) for num_packs in self._packs_by_epoch()]
        return np.concatenate([[0], np.cumsum(per_epoch)]).astype(np.int64)

    def _packs_by_epoch(self) -> list[int]:
        """Number of packs of each epoch; where it is the same in all, none is packed."""
        known = None if self.source_counts else constant_num_packs(self._item_lengths, capacity=self.capacity)
        return [known or len(self._epoch_packs(epoch)) for epoch in range(self.epochs)]

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the run."""
        return int(self.first_steps[-1])

    def step(self, number: int) -> Step:
        """What step `number` (0-based over the run) holds.

        Raises:
            IndexError: outside 0..num_steps - 1.
        """
        if not 0 <= number < self.num_steps:
            raise IndexError(f"step {number} is outside 0..{self.num_steps - 1}")
        epoch = int(np.searchsorted(self.first_steps, number, side="right")) - 1
        packs = self._packs_of(epoch, number - int(self.first_steps[epoch]))
        samples = np.concatenate(packs)
        return Step(
            number=number,
            epoch=epoch,
            packs=packs,
            num_tokens=int(self.lengths[samples].sum()),
            num_trained_tokens=int(self.num_trained[samples].sum()),
        )

    def samples_by_source(self, step: Step) -> list[int]:
        """How many samples of each source a step holds."""
        return np.bincount(self.sources[step.samples], minlength=self._num_sources).tolist()

    def deal(self, step: Step) -> IntArray:
        """Who runs which pack when.

        Returns:
            (world, num_micro_batches) int64: number of a pack of `step`, or IDLE.
        """
        costs = np.array([self.pack_cost(p) for p in step.packs])
        return deal(costs, world=self.world)

    def pack_cost(self, samples: IntArray) -> float:
        """Predicted cost of a pack that holds `samples`."""
        return float(self.sample_costs(samples).sum())

    def sample_costs(self, samples: IntArray) -> npt.NDArray[np.float64]:
        """Predicted cost of each sample in a pack."""
        return self.cost.of(self.lengths[samples], self.num_trained[samples])

    @cached_property
    def largest_pack(self) -> IntArray:
        """(num_samples_in_pack,) sample numbers of the run's pack with most tokens.

        Of many steps with several packs of their own each, only those with most tokens are looked at; of many
        epochs, only the first.
        """
        largest = np.empty(0, np.int64)
        for epoch in range(min(self.epochs, EPOCHS_SEARCHED)):
            if self._tokens_in(largest) == self.capacity:
                break
            largest = max(largest, self._largest_of_epoch(epoch), key=self._tokens_in)
        return largest

    @property
    def distinct_epochs(self) -> list[tuple[int, int]]:
        """(epoch, how many hold its samples, itself included): one of all, unless sources are mixed."""
        return [(epoch, 1) for epoch in range(self.epochs)] if self.source_counts else [(0, self.epochs)]

    def epoch_samples(self, epoch: int) -> IntArray:
        """Sample numbers of an epoch, in no particular order; a mixture may repeat some."""
        return self._epoch_samples(epoch) if self.source_counts else np.arange(self.num_samples)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of what the steps hold; the world size and the dealing are not part of it."""
        settings = [self.capacity, self.seed, self.epochs, self.samples_per_step, self.packs_per_step]
        digest = hashlib.sha256(json.dumps([settings, self.source_counts]).encode())
        columns = [self.lengths, self.num_trained]
        if self.source_counts:
            columns.append(self.sources)
        if self.units is not None:
            columns += [self.units.sizes, self._samples_of(np.arange(len(self.units)))]
        for column in columns:
            digest.update(np.ascontiguousarray(column, "<i8").data)
        return digest.hexdigest()[:16]

    @cached_property
    def earlier_fingerprint(self) -> str:
        """As checkpoints of earlier versions name the same plan; 1.1 s and 89 MB for 2 million samples."""
        mixed = {"mixture": [self.sources.tolist(), self.source_counts]} if self.source_counts else {}
        return fingerprint_of(
            {
                **mixed,
                "lengths": self.lengths.tolist(),
                "num_trained": self.num_trained.tolist(),
                "settings": [self.capacity, self.seed, self.epochs],
                "mode": [self.samples_per_step, self.packs_per_step],
            }
        )

    def _packs_of(self, epoch: int, number: int) -> tuple[IntArray, ...]:
        if self.packs_per_step:
            first = number * self.packs_per_step
            packs = self._epoch_packs(epoch)
            return tuple(packs[p] for p in range(first, min(first + self.packs_per_step, len(packs))))
        return self._pack_step(self._items_of(epoch, number), _seed_of(self.seed, epoch, number))

    def _items_of(self, epoch: int, number: int) -> IntArray:
        """What a step of so many samples holds."""
        if self.units is not None:
            return self._epoch_cuts(epoch)[number]
        assert self.samples_per_step
        return self._ordered(epoch)[number * self.samples_per_step : (number + 1) * self.samples_per_step]

    def _cut_epoch(self, epoch: int) -> list[IntArray]:
        assert self.units is not None and self.samples_per_step
        return self.units.cut(self._ordered(epoch), self.samples_per_step)

    def _ordered(self, epoch: int) -> IntArray:
        """(num_items,) numbers of items in the order in which steps of so many samples take them."""
        num_items = self.num_samples if self.units is None else len(self.units)
        order = _shuffled(num_items, self.seed, epoch)
        return self._epoch_samples(epoch)[order] if self.source_counts else order

    def _pack_step(self, items: IntArray, seed: int) -> tuple[IntArray, ...]:
        """Pack the items of one step: few packs, but as many on every rank, and ranks evenly loaded."""
        lengths = self._item_lengths[items]
        if self.world == 1 and lengths.sum() <= self.capacity:
            return (self._samples_of(items[np.argsort(-lengths, kind="stable")]),)
        packs = pack(lengths, capacity=self.capacity, seed=seed)
        best_fit = [packs[p] for p in range(len(packs))]
        if self.world > 1:
            costs = self._costs_of(items)
            best_fit = cut_evenly(best_fit, lengths, costs, capacity=self.capacity, world=self.world)
        return tuple(self._samples_of(items[members]) for members in best_fit)

    def _samples_of(self, items: IntArray) -> IntArray:
        return items if self.units is None else self.units.samples_of(items)

    def _costs_of(self, items: IntArray) -> npt.NDArray[np.float64]:
        if self.units is None:
            return self.sample_costs(items)
        return np.array([self.pack_cost(self.units.samples_of(np.array([item]))) for item in items])

    def _tokens_in(self, samples: IntArray) -> int:
        return int(self.lengths[samples].sum())

    def _largest_of_epoch(self, epoch: int) -> IntArray:
        if self.packs_per_step:
            packs = self._epoch_packs(epoch)
            return packs[int(np.argmax(np.add.reduceat(self.lengths[packs.indices], packs.offsets[:-1])))]
        tokens = self._tokens_of_steps(epoch)
        largest = np.empty(0, np.int64)
        for number in np.argsort(-tokens, kind="stable")[:STEPS_SEARCHED]:
            if min(tokens[number], self.capacity) <= self._tokens_in(largest):
                break
            largest = max(largest, *self._packs_of(epoch, int(number)), key=self._tokens_in)
        return largest

    def _tokens_of_steps(self, epoch: int) -> IntArray:
        """Of an epoch in steps of so many samples."""
        if self.units is not None:
            return np.array([self._item_lengths[items].sum() for items in self._epoch_cuts(epoch)])
        assert self.samples_per_step
        starts = np.arange(0, self.num_samples, self.samples_per_step)
        return np.add.reduceat(self.lengths[self._ordered(epoch)], starts)

    def _pack_epoch(self, epoch: int) -> Packs:
        seed = _seed_of(self.seed, epoch)
        if self.units is not None:
            packs = pack(self._item_lengths, capacity=self.capacity, seed=seed)
            ends = np.concatenate([[0], np.cumsum(self.units.sizes[packs.indices])])
            return Packs(indices=self.units.samples_of(packs.indices), offsets=ends[packs.offsets])
        if not self.source_counts:
            return pack(self.lengths, capacity=self.capacity, seed=seed)
        samples = self._epoch_samples(epoch)
        packs = pack(self.lengths[samples], capacity=self.capacity, seed=seed)
        return Packs(indices=samples[packs.indices], offsets=packs.offsets)

    def _draw_epoch(self, epoch: int) -> IntArray:
        assert self.source_counts
        return draw_epoch(self.sources, self.source_counts, seed=self.seed, epoch=epoch)


@lru_cache(maxsize=2)
def _shuffled(num_samples: int, seed: int, epoch: int) -> IntArray:
    return np.random.default_rng(_seed_of(seed, epoch)).permutation(num_samples)


def _seed_of(*parts: int) -> int:
    """One 63-bit seed from several integers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
