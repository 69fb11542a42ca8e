"""Overfitting one step: whether a model learns what the first step of its plan holds.

In: an engine, where its packs come from. Out: a sentence; the weights are of no use afterwards.
Invariant: it is the run's own first step: the same packs, weights of positions and seeds.
Trade-off: at the peak learning rate, at most 500 times: a prompt with several answers never gets there.
"""

from __future__ import annotations

import logging

from sftcore.config import TrainSettings
from sftcore.errors import Problem, TrainingFailed, UserInputError
from sftcore.train.batches import PackSource, rank_batches
from sftcore.train.engine import Engine
from sftcore.train.rates import rates_of

log = logging.getLogger("sftcore.debug")
OVERFIT_LOSS, OVERFIT_STEPS = 0.01, 500


def check_overfit(settings: TrainSettings) -> None:
    """Refuse what keeps a loss above zero.

    Raises:
        UserInputError: label smoothing or z-loss.
    """
    bad = {"train.label_smoothing": settings.label_smoothing, "train.z_loss": settings.z_loss}
    problems = [
        Problem(what="a loss with this can't reach 0", where=key, got=str(value), remedy=f"--set {key}=0")
        for key, value in bad.items()
        if value
    ]
    if problems:
        raise UserInputError(*problems)


def overfit_one_step(settings: TrainSettings, engine: Engine, source: PackSource) -> str:
    """Repeat the plan's first step, at the peak learning rate, until its loss is below `OVERFIT_LOSS`.

    Returns:
        what happened.

    Raises:
        TrainingFailed: `OVERFIT_STEPS` repetitions were not enough.
    """
    batches, seeds = rank_batches(source, source.schedule.step(0))
    rates = {name: rate(0) for name, rate in rates_of(settings, source.schedule.num_steps).items()}
    rates["lr"] = settings.peak_lr
    first = loss = float("nan")
    for number in range(1, OVERFIT_STEPS + 1):
        loss = engine.step(batches, seeds=seeds, rates=rates).loss
        first = loss if number == 1 else first
        if number % 10 == 1:
            log.info("repetition %d: loss %.4f", number, loss)
        if loss < OVERFIT_LOSS:
            return f"loss {first:.4f} -> {loss:.4f} after {number} repetitions of step 1: it can be learned"
    raise TrainingFailed(
        Problem(
            what=f"step 1 was not learned: loss {first:.4f} -> {loss:.4f} in {OVERFIT_STEPS} repetitions",
            allowed=f"below {OVERFIT_LOSS}",
            remedy="raise train.lr, or look for a prompt with several answers (sftcore inspect)",
        )
    )
