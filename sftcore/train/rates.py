"""Rates: numbers that change from step to step, by name; today the learning rate.

In: the recipe's train section, the number of steps. Out: {name: step (0-based) -> value}.
Invariant: a rate is a pure function of the step, so that a resumed run goes on with the same values.
Trade-off: all rates are numbers of the whole model: the optimizer's groups scale the learning rate for
themselves (`optimizers.LR_SCALE`).

The engine hands each step's values to the optimizer (`lr`) and to the objective (`Objective.rates`); they
land in metrics.jsonl by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from sftcore.config import TrainSettings


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Rate of step `step` (0-based): linear warm-up over the first steps, then the scheduler's decay.

    Warm-up takes ceil(warmup_ratio * num_steps) steps, the first of which has 1/n of the peak; cosine and
    linear would reach the lowest rate (0, or min_lr_ratio of the peak) at step `num_steps`, one after the
    last. wsd (warm-up, stable, decay; arXiv 2404.06395) keeps the peak and falls linearly over the last
    ceil(decay_ratio * num_steps) steps.
    """
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return settings.peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    decay = max(1, math.ceil(settings.decay_ratio * num_steps))
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "wsd": min(1.0, (num_steps - step) / decay),
    }[settings.scheduler]
    return settings.peak_lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * factor)


RATES: dict[str, Callable[..., float]] = {  # (step, num_steps, settings) -> value
    "lr": learning_rate,
}


def rates_of(settings: TrainSettings, num_steps: int) -> dict[str, Callable[[int], float]]:
    """Every rate of a run of so many steps, as a function of the step."""
    return {name: partial(rate, num_steps=num_steps, settings=settings) for name, rate in RATES.items()}
