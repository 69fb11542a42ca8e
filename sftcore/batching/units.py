"""Units: samples that have to share a pack (the two of a pair, say) are packed, dealt and shuffled as one.

In: the number of each sample's unit. Out: for each unit its samples, in order, and sums over them.
Invariant: every sample is in exactly one unit.
Trade-off: a step of N samples takes whole units, and so may hold up to a unit's size less one more than N.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sftcore.batching.packing import IntArray
from sftcore.errors import Problem, UserInputError

MAX_NAMED = 8


class Units:
    """A partition of samples; units are numbered by their order.

    >>> units = Units([7, 5, 7])
    >>> len(units), units.samples_of(np.array([1, 0])).tolist(), units.total(np.array([10, 20, 30])).tolist()
    (2, [0, 2, 1], [20, 40])

    Args (attributes):
        sizes: (num_units,) samples in each.
    """

    def __init__(self, numbers: npt.ArrayLike) -> None:
        """`numbers`: (num_samples,) integers; samples of one number are a unit."""
        _, unit_of, self.sizes = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
        self._order = np.argsort(unit_of, kind="stable")
        self._starts = np.cumsum(self.sizes) - self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def total(self, values: IntArray) -> IntArray:
        """(num_units,) sums of samples' values."""
        return np.add.reduceat(values[self._order], self._starts)

    def samples_of(self, units: IntArray) -> IntArray:
        """Sample numbers of units, one unit after another."""
        sizes = self.sizes[units]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._order[np.repeat(self._starts[units], sizes) + within]

    def cut(self, units: IntArray, samples_per_step: int) -> list[IntArray]:
        """Units in the order given, cut into steps: a unit is in the step of its first sample."""
        before = np.cumsum(self.sizes[units]) - self.sizes[units]
        borders = np.flatnonzero(np.diff(before // samples_per_step)) + 1
        return np.split(units, borders)


def check_units(units: Units, lengths: IntArray, capacity: int, *, is_mixed: bool) -> None:
    """Refuse a unit that no pack can hold, and sources that are mixed: a mixture may draw half of a unit.

    Raises:
        UserInputError: with the unit's samples, by number.
    """
    problems = []
    tokens = units.total(lengths)
    largest = int(np.argmax(tokens))
    if tokens[largest] > capacity:
        samples = ", ".join(map(str, units.samples_of(np.array([largest]))[:MAX_NAMED]))
        problems.append(
            Problem(
                what=f"samples that must share a pack have more tokens than it holds: {samples}",
                where="batch.capacity",
                got=str(capacity),
                allowed=f"{tokens[largest]} or more",
            )
        )
    if is_mixed:
        what = "sources are mixed, and a mixture may draw a part of the samples that must share a pack"
        remedy = "take out data.temperature and the sources' weights"
        problems.append(Problem(what=what, where="data.train", remedy=remedy))
    if problems:
        raise UserInputError(*problems)
