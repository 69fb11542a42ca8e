"""The loop: for each step of the plan, its packs -> the engine -> a line of metrics; now and then a save.

In: an engine, a schedule, a store. Out: trained weights in the engine; RUN/metrics.jsonl, RUN/checkpoints.
Invariant: step s of a run is the same computation whether or not the run was interrupted before it.
Trade-off: batches are collated just before they run: about 0.1 ms per pack, against 100 ms and more to
compute it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sftcore import dist
from sftcore.batching.collate import Batch, collate
from sftcore.batching.mixture import samples_per_epoch, temperature_shares
from sftcore.batching.schedule import IDLE, CostCoefficients, Schedule, Step
from sftcore.config import Recipe, TrainSettings
from sftcore.data.store import TokenStore
from sftcore.errors import Problem, StoppedOnRequest, TrainingFailed, UserInputError
from sftcore.train.checkpoint import TrainState, save_checkpoint
from sftcore.train.engine import Engine, NotFinite
from sftcore.train.metrics import MetricsWriter, StepMetrics, peak_memory_bytes
from sftcore.train.stopping import StopRequest, name_samples


def make_schedule(
    recipe: Recipe, store: TokenStore, *, world: int, cost: CostCoefficients | None = None
) -> Schedule:
    """The plan of a run: a pure function of the store's lengths and the recipe."""
    return Schedule(
        lengths=store.lengths,
        num_trained=store.num_trained,
        capacity=recipe.batch.capacity,
        seed=recipe.seed,
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
) -> None:
    """Train from step `first` (0-based) to the end; all ranks call it.

    Raises:
        TrainingFailed: a loss or gradient norm that is not finite; the last checkpoint stays.
        StoppedOnRequest: a rank was asked to stop; a checkpoint was made.
    """
    stop = stop or StopRequest()
    run = recipe.run_folder
    names = [source["name"] for source in store.manifest["sources"]]
    with MetricsWriter(
        run, steps_done=first, num_steps=schedule.num_steps, tensorboard=recipe.tracking.tensorboard
    ) as writer:
        for number in range(first, schedule.num_steps):
            started = time.perf_counter()
            step = schedule.step(number)
            batches, seeds = rank_batches(recipe, schedule, store, step)
            data_seconds = time.perf_counter() - started
            lr = learning_rate(number, schedule.num_steps, recipe.train)
            try:
                result = engine.step(batches, seeds=seeds, lr=lr, stop=stop.requested)
            except NotFinite as error:
                raise _explain_not_finite(error, schedule, store, step) from error
            seconds = time.perf_counter() - started
            _, (peak,) = dist.sums_and_maxima([], [peak_memory_bytes()])
            writer.write(
                StepMetrics(
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
                    elapsed_seconds=writer.elapsed_seconds,
                    step_seconds=seconds,
                    data_seconds=data_seconds,
                    tokens_per_second=step.num_tokens / seconds,
                    trained_tokens_per_second=step.num_trained_tokens / seconds,
                    rank_imbalance=result.rank_imbalance,
                    peak_memory_bytes=int(peak),
                )
            )
            stopping = result.stop_requested and number + 1 < schedule.num_steps
            if stopping or _is_save_due(number + 1, schedule.num_steps, recipe.checkpoint.save_every_steps):
                state = state_after(number, schedule, step.epoch)
                save_checkpoint(run, engine, state, keep=recipe.checkpoint.keep)
            if stopping:
                raise StoppedOnRequest(f"stopped on request after step {number + 1}; start again to go on")


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


def _is_save_due(steps_done: int, num_steps: int, every: int) -> bool:
    return steps_done % every == 0 or steps_done == num_steps


def rank_batches(
    recipe: Recipe, schedule: Schedule, store: TokenStore, step: Step
) -> tuple[list[Batch], list[int]]:
    """This rank's packs of a step, and a dropout seed for each.

    A rank without work in a micro-batch runs the step's smallest pack with zero weights.
    """
    dealt = schedule.deal(step)[dist.rank()]
    smallest = min(range(len(step.packs)), key=lambda p: int(schedule.lengths[step.packs[p]].sum()))
    batches = [
        collate(
            [store[int(i)] for i in step.packs[smallest if p == IDLE else p]],
            normalise=recipe.train.normalise,
            num_trained_in_step=step.num_trained_tokens,
            num_samples_in_step=step.num_samples,
            idle=bool(p == IDLE),
        )
        for p in dealt
    ]
    return batches, pack_seeds(recipe.seed, step, dealt)


def pack_seeds(seed: int, step: Step, packs: Sequence[int] | np.ndarray) -> list[int]:
    """A 32-bit seed per pack from (seed, epoch, step, pack): dropout needs no saved state, nor the rank."""
    return [
        int(np.random.SeedSequence([seed, step.epoch, step.number, int(p) + 1]).generate_state(1)[0])
        for p in packs
    ]


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Rate of step `step` (0-based): linear warm-up over the first steps, then the scheduler's decay.

    Warm-up takes ceil(warmup_ratio * num_steps) steps, the first of which has 1/n of the peak; cosine and
    linear would reach 0 at step `num_steps`, one after the last.
    """
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.scheduler]
    return settings.lr * factor
