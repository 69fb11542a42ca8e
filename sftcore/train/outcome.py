"""What a step asks and what comes of it: a result, or a number that is not finite.

In: nothing. Out: the nouns that engine and loop hand on.
Invariant: every rank has the same outcome of a step.
Trade-off: a module of its own for three nouns, so that the engine can be read at a sitting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sftcore.batching.packing import IntArray
from sftcore.errors import TrainingFailed

StopAsked = Callable[[], bool]


def never() -> bool:
    """Nobody asks for a stop."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave, the same on every rank.

    Args:
        loss: exact loss over all trained tokens of the step.
        metrics: the objective's sums over the step, by name.
        grad_norm: L2 norm of the step's gradient before clipping.
        rank_imbalance: slowest rank's compute seconds / mean - 1.
        stop_requested: whether any rank was asked to stop.
        seconds: of forward, backward and update on this rank.
        peak_memory_bytes: highest of any rank so far; the first update's own is seen a step later.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float
    rank_imbalance: float
    stop_requested: bool
    seconds: float
    peak_memory_bytes: int


class NotFinite(TrainingFailed):
    """A loss or gradient norm that is infinite or not a number; weights and optimizer are untouched.

    Raised by all ranks in the same step; `micro_batches` are this rank's packs whose own loss is not finite.
    """

    def __init__(self, what: str, micro_batches: list[int]) -> None:
        super().__init__(what)
        self.micro_batches = micro_batches


class PackTooLarge(TrainingFailed):
    """There was no memory for a pack; its (num_samples,) sample numbers, and the step, 1-based."""

    def __init__(self, what: str, pack: IntArray, step: int) -> None:
        super().__init__(what)
        self.pack, self.step = pack, step
