"""What the GPU benchmark's sections share: a target, a measurement to be made, and a clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is measured.

    Args:
        device: cuda, or cpu to see the code run.
        is_tiny: shapes of a few thousand weights.
        lengths: token counts to draw documents from.
    """

    device: torch.device
    is_tiny: bool
    lengths: np.ndarray

    def documents(self, num_tokens: int, *, seed: int = 0) -> tuple[int, ...]:
        """Lengths of documents that fill a pack of exactly `num_tokens`; the last one is cut."""
        rng = np.random.default_rng(seed)
        drawn: list[int] = []
        while sum(drawn) < num_tokens:
            drawn.append(int(rng.choice(self.lengths)))
        drawn[-1] -= sum(drawn) - num_tokens
        return tuple(drawn)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Let go of what cycles hold, and begin to watch the device's memory anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Most memory that torch held on the GPU since `reset_peak`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A measurement to be made.

    Args:
        description: section and settings, first in its row.
        run: makes it; returns the row's figures.
        seconds: it takes, by arithmetic, with set-up and compilation; must be left for it to begin.
    """

    description: dict
    run: Callable[[], dict]
    seconds: float


def seconds_of(target: Target, run: Callable[[], object], *, warmup: int = 2, repeats: int = 5) -> float:
    """Median wall seconds of a call, the device waited for."""
    for _ in range(warmup):
        run()
    taken = []
    for _ in range(repeats):
        target.synchronise()
        started = time.perf_counter()
        run()
        target.synchronise()
        taken.append(time.perf_counter() - started)
    return median(taken)
