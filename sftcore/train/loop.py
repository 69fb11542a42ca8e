"""The loop: for each step of the plan, its packs -> the engine -> a line of metrics; now and then a save.

In: an engine, a schedule, a store. Out: trained weights in the engine; RUN/metrics.jsonl, RUN/checkpoints.
Invariant: step s of a run is the same computation whether or not the run was interrupted before it: a step
that is given up for a stop changes nothing, and the checkpoint is of the steps before it.
Trade-off: the largest pack of the plan runs once with zero weights before the first step, so that a run that
will not fit fails in its first minute; it costs a pack's time at each start.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sftcore import dist
from sftcore.batching.dealing import IDLE
from sftcore.batching.mixture import samples_per_epoch, temperature_shares
from sftcore.batching.schedule import CostCoefficients, Schedule, Step
from sftcore.config import Recipe, TrainSettings
from sftcore.data.store import TokenStore
from sftcore.errors import Problem, StoppedOnRequest, TrainingFailed, UserInputError
from sftcore.heap import is_out_of_memory
from sftcore.precision import dtype_of
from sftcore.train.batches import rank_batches, weightless_batch
from sftcore.train.checkpoint import COMMITTED, TrainState, checkpoint_folder, save_checkpoint
from sftcore.train.engine import Engine
from sftcore.train.garbage import GarbageCollector
from sftcore.train.memory import explain_out_of_memory
from sftcore.train.metrics import MetricsWriter, StepMetrics, model_flops_utilisation
from sftcore.train.outcome import NotFinite
from sftcore.train.stopping import Abandoned, StopNotice, StopRequest, name_samples
from sftcore.train.validate import Validation
from sftcore.train.watchdog import Watchdog

log = logging.getLogger(__name__)


def make_schedule(
    recipe: Recipe, store: TokenStore, *, world: int, cost: CostCoefficients | None = None
) -> Schedule:
    """The plan of a run: a pure function of the store's lengths and the recipe."""
    return Schedule(
        lengths=store.lengths,
        num_trained=store.num_trained,
        capacity=recipe.batch.capacity,
        seed=recipe.training_seed,
        epochs=recipe.train.epochs,
        world=world,
        samples_per_step=recipe.batch.samples_per_step,
        tokens_per_step=recipe.batch.tokens_per_step,
        cost=cost,
        sources=store.sources,
        source_counts=source_counts(recipe, store),
    )


def source_counts(recipe: Recipe, store: TokenStore) -> list[int] | None:
    """Samples of each training source in an epoch, if the recipe mixes them; None: each sample once.

    Raises:
        UserInputError: a weighted source has no samples.
    """
    data = recipe.data
    weights = [source.weight for source in data.train if source.weight is not None]
    if not weights and data.temperature is None:
        return None
    sizes = np.bincount(store.sources, minlength=len(data.train)).tolist()
    if 0 in sizes:
        where = f"data.train.{sizes.index(0)}"
        remedy = "see the store's ledger, or take the source out"
        raise UserInputError(
            Problem(what="no sample is left of this mixed source", where=where, remedy=remedy)
        )
    return samples_per_epoch(len(store), weights or temperature_shares(sizes, data.temperature or 1.0))


def run_steps(
    recipe: Recipe,
    engine: Engine,
    schedule: Schedule,
    store: TokenStore,
    *,
    first: int,
    stop: StopRequest | None = None,
    validation: Validation | None = None,
    watchdog: Watchdog | None = None,
) -> None:
    """Train from step `first` (0-based) to the end, or until validation says enough; all ranks call it.

    A request to stop lets the step under way end if its packs are done, else it is given up; so is an
    evaluation, which the next start makes before its first step.

    Raises:
        TrainingFailed: a loss or gradient norm that is not finite, or no memory; the last checkpoint stays.
        StoppedOnRequest: a rank was asked to stop; there is a checkpoint of all steps done.
    """
    stop = stop or StopRequest()
    watchdog = watchdog or Watchdog()
    steps_done = first
    with (
        MetricsWriter(recipe, steps_done=first, num_steps=schedule.num_steps) as writer,
        GarbageCollector() as garbage,
    ):
        saver = _Saver(recipe, engine, schedule, writer, first=first, validation=validation)
        try:
            _validate_if_due(validation, engine, schedule, first, stop=stop)
            for number in range(first, schedule.num_steps):
                if validation and validation.is_exhausted:
                    log.info("no lower valid loss in %d evaluations: enough", recipe.train.patience or 0)
                    break
                metrics, is_stop_requested = _train_step(
                    recipe, engine, schedule, store, number, stop=stop, is_first=number == first
                )
                writer.write(metrics)
                watchdog.step_done(metrics.step_seconds)
                garbage.step_done()
                saver.notice.see_step(metrics.step_seconds, math.ceil(metrics.num_packs / dist.world_size()))
                steps_done = number + 1
                if is_stop_requested and steps_done < schedule.num_steps:
                    raise Abandoned
                with watchdog.suspended():
                    _validate_if_due(validation, engine, schedule, steps_done, stop=stop)
                    saver.save_if_due(steps_done)
        except Abandoned:
            with watchdog.suspended():
                saver.save(steps_done)
            said = f"after step {steps_done}" if steps_done else "before the first step was done"
            raise StoppedOnRequest(f"stopped on request {said}; start again to go on") from None


class _Saver:
    """Saves a run's checkpoints, none twice, each after the rows of its steps."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        schedule: Schedule,
        writer: MetricsWriter,
        *,
        first: int,
        validation: Validation | None,
    ) -> None:
        self.recipe, self.engine, self.schedule, self.writer = recipe, engine, schedule, writer
        self.validation = validation
        is_saved = (checkpoint_folder(recipe.run_folder, first) / COMMITTED).exists()
        self.saved = first if dist.gather_objects(is_saved)[0] else 0
        self.notice = StopNotice.of_environment()

    def save_if_due(self, steps_done: int) -> None:
        """Save at each `save_every_steps`, and after the last step."""
        if steps_done % self.recipe.checkpoint.save_every_steps == 0 or steps_done == self.schedule.num_steps:
            self.save(steps_done)

    def save(self, steps_done: int) -> None:
        """Save, if there is a step and it is not saved yet."""
        if steps_done in (0, self.saved):
            return
        started = time.perf_counter()
        self.writer.sync()
        state = replace(
            state_after(steps_done - 1, self.schedule, self.schedule.step(steps_done - 1).epoch),
            dtype=dtype_of(self.recipe.model),
            num_evaluations=len(self.validation.done) if self.validation else 0,
        )
        save_checkpoint(self.recipe.run_folder, self.engine, state, keep=self.recipe.checkpoint.keep)
        self.saved = steps_done
        self.notice.see_save(time.perf_counter() - started)


def _validate_if_due(
    validation: Validation | None, engine: Engine, schedule: Schedule, steps_done: int, *, stop: StopRequest
) -> None:
    """Evaluate where it is due and not done: after a step, or as a stop kept it from being done there."""
    if validation is None or not steps_done:
        return
    if validation.is_due(steps_done, ends_epoch=bool(np.isin(steps_done, schedule.first_steps[1:]))):
        epoch = schedule.step(steps_done - 1).epoch
        validation.evaluate(engine, step=steps_done, epoch=epoch, stop=lambda: stop.requested)


def _train_step(
    recipe: Recipe,
    engine: Engine,
    schedule: Schedule,
    store: TokenStore,
    number: int,
    *,
    stop: StopRequest,
    is_first: bool,
) -> tuple[StepMetrics, bool]:
    """One optimizer step, its metrics, and whether any rank was asked to stop."""
    started = time.perf_counter()
    step = schedule.step(number)
    batches, seeds = rank_batches(recipe, schedule, store, step)
    data_seconds = time.perf_counter() - started
    lr = learning_rate(number, schedule.num_steps, recipe.train)
    try:
        if is_first:
            engine.rehearse(weightless_batch(store, schedule.largest_pack))
        result = engine.step(batches, seeds=seeds, lr=lr, stop=lambda: stop.requested)
    except NotFinite as error:
        raise _explain_not_finite(error, schedule, store, step) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        pack = schedule.largest_pack if is_first else max(step.packs, key=schedule.pack_cost)
        raise explain_out_of_memory(error, recipe, schedule, pack, step=number + 1) from error
    seconds = time.perf_counter() - started
    names = [source["name"] for source in store.manifest["sources"]]
    metrics = StepMetrics(
        step=number + 1,
        epoch=step.epoch,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        num_tokens=step.num_tokens,
        num_trained_tokens=step.num_trained_tokens,
        num_pad_tokens=0,
        num_samples=step.num_samples,
        num_packs=len(step.packs),
        num_samples_by_source=dict(zip(names, schedule.samples_by_source(step), strict=False)),
        step_seconds=seconds,
        data_seconds=data_seconds,
        compute_seconds=result.seconds,
        tokens_per_second=step.num_tokens / seconds,
        trained_tokens_per_second=step.num_trained_tokens / seconds,
        mfu=model_flops_utilisation(sum(map(schedule.pack_cost, step.packs)), seconds),
        rank_imbalance=result.rank_imbalance,
        peak_memory_bytes=result.peak_memory_bytes,
    )
    return metrics, result.stop_requested


def _explain_not_finite(
    error: NotFinite, schedule: Schedule, store: TokenStore, step: Step
) -> TrainingFailed:
    """Which step, packs and samples it was; all ranks call it, and all say the same."""
    dealt = schedule.deal(step)
    found = {
        int(dealt[rank, micro_batch])
        for rank, numbers in enumerate(dist.gather_objects(error.micro_batches))
        for micro_batch in numbers
    } - {IDLE}
    packs = sorted(found) or list(range(len(step.packs)))
    ids = store.ids
    samples = [ids[int(i)] for p in packs for i in step.packs[p]]
    return TrainingFailed(
        Problem(
            what=f"{error} in step {step.number + 1}; the weights were not updated",
            got=f"packs {', '.join(map(str, packs))} of {len(step.packs)}, samples {name_samples(samples)}",
            remedy="look at these samples (sftcore inspect), lower train.lr, or raise train.warmup_ratio; "
            "the last checkpoint is good",
        )
    )


def state_after(number: int, schedule: Schedule, epoch: int) -> TrainState:
    """What a checkpoint after step `number` (0-based) says of itself."""
    return TrainState(
        step=number + 1,
        epoch=epoch,
        plan_fingerprint=schedule.fingerprint,
        world_size=dist.world_size(),
        num_threads=torch.get_num_threads(),
        plan_settings=plan_settings(schedule),
    )


def plan_settings(schedule: Schedule) -> dict[str, Any]:
    """What decides the content of a plan's steps, by recipe key."""
    return {
        "seed": schedule.seed,
        "train.epochs": schedule.epochs,
        "batch.capacity": schedule.capacity,
        "batch.samples_per_step": schedule.samples_per_step,
        "packs per step": schedule.packs_per_step,
        "number of samples": schedule.num_samples,
        "tokens in an epoch": int(schedule.lengths.sum()),
        "trained tokens in an epoch": int(schedule.num_trained.sum()),
    }


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
