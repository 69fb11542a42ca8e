"""The loop: for each step of the plan, its packs -> the engine -> a line of metrics; now and then a save.

In: an engine, where its packs come from. Out: trained weights in the engine; RUN/metrics.jsonl,
RUN/checkpoints.
Invariant: step s of a run is the same computation whether or not the run was interrupted before it: a step
that is given up for a stop changes nothing, and the checkpoint is of the steps before it.
Trade-off: the largest pack of the plan runs once with zero weights before the first step, so that a run that
will not fit fails in its first minute; it costs a pack's time at each start.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sftcore import dist
from sftcore.amounts import duration
from sftcore.batching.dealing import IDLE
from sftcore.batching.packing import IntArray
from sftcore.batching.schedule import Step
from sftcore.config import CheckpointSettings, TrainSettings
from sftcore.errors import EnoughSteps, Problem, StoppedOnRequest, TrainingFailed
from sftcore.heap import is_out_of_memory
from sftcore.train.batches import PackSource, rank_batches, weightless_batch
from sftcore.train.checkpoint import COMMITTED, TrainState, checkpoint_folder, save_checkpoint
from sftcore.train.engine import Engine
from sftcore.train.garbage import GarbageCollector
from sftcore.train.metrics import MetricsWriter, StepMetrics, model_flops_utilisation
from sftcore.train.observers import REHEARSAL, Observer
from sftcore.train.outcome import NotFinite, PackTooLarge, StepResult
from sftcore.train.plan import plan_settings
from sftcore.train.rates import rates_of
from sftcore.train.stopping import Abandoned, StopNotice, StopRequest, name_samples
from sftcore.train.validate import Validation
from sftcore.train.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What decides how steps are taken and kept.

    Args:
        folder: of the run.
        dtype: in which the model is held.
        max_steps: of this start, after which it stops; None: at the end.
    """

    folder: Path
    train: TrainSettings
    checkpoint: CheckpointSettings
    dtype: str
    max_steps: int | None = None


@dataclass(kw_only=True)
class Loop:
    """The steps of a run, and all that accompanies them; every rank has one.

    Args:
        stop: whether this rank was asked to stop.
        validation: of a run with held-out samples.
        observers: entered around the rehearsal and around each step.
    """

    engine: Engine
    source: PackSource
    settings: LoopSettings
    writer: MetricsWriter
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog = field(default_factory=Watchdog)
    validation: Validation | None = None
    observers: Sequence[Observer] = ()

    def __post_init__(self) -> None:
        self._schedule = self.source.schedule
        self._rates = rates_of(self.settings.train, self._schedule.num_steps)
        self._saved = 0
        self._notice = StopNotice.of_environment()

    def run_steps(self, first: int) -> None:
        """Train from step `first` (0-based) to the end, or until validation says enough; all ranks call it.

        A request to stop lets the step under way end if its packs are done, else it is given up; so is an
        evaluation, which the next start makes before its first step.

        Raises:
            TrainingFailed: a loss or gradient norm that is not finite, or no memory; the last checkpoint
                stays.
            StoppedOnRequest: a rank was asked to stop; there is a checkpoint of all steps done.
            EnoughSteps: there were `max_steps`; likewise.
        """
        num_steps, enough = self._schedule.num_steps, first + (self.settings.max_steps or math.inf)
        steps_done = first
        is_saved = (checkpoint_folder(self.settings.folder, first) / COMMITTED).exists()
        self._saved = first if dist.gather_objects(is_saved)[0] else 0
        if first < num_steps:
            self._rehearse(first)
        with self.writer, GarbageCollector() as garbage:
            try:
                self._validate_if_due(first)
                for number in range(first, num_steps):
                    if self.validation and self.validation.is_exhausted:
                        patience = self.settings.train.patience or 0
                        log.info("no lower valid loss in %d evaluations: enough", patience)
                        break
                    is_stop_requested = self._step(number)
                    garbage.step_done()
                    steps_done = number + 1
                    if (is_stop_requested or steps_done == enough) and steps_done < num_steps:
                        raise Abandoned
                    with self.watchdog.suspended():
                        self._validate_if_due(steps_done)
                        self._save_if_due(steps_done)
            except Abandoned:
                with self.watchdog.suspended():
                    self._save(steps_done)
                when = f"after step {steps_done}" if steps_done else "before the first step was done"
                kind = EnoughSteps if steps_done == enough else StoppedOnRequest
                raise kind(f"stopped on request {when}; start again to go on") from None

    def _rehearse(self, first: int) -> None:
        """Run the plan's largest pack without weight; its time is no step's."""
        started, pack = time.perf_counter(), self._schedule.largest_pack
        with self._observed(REHEARSAL), _memory_failures(pack, first + 1):
            self.engine.rehearse(weightless_batch(self.source, pack), rates=self._rates_at(first))
        log.info("the largest pack was rehearsed in %s", duration(time.perf_counter() - started))

    def _step(self, number: int) -> bool:
        """One optimizer step and its line of metrics; whether any rank was asked to stop."""
        started = time.perf_counter()
        step = self._schedule.step(number)
        batches, seeds = rank_batches(self.source, step)
        data_seconds = time.perf_counter() - started
        rates = self._rates_at(number)
        largest = max(step.packs, key=self._schedule.pack_cost)
        try:
            with self._observed(number + 1), _memory_failures(largest, number + 1):
                result = self.engine.step(batches, seeds=seeds, rates=rates, stop=lambda: self.stop.requested)
        except NotFinite as error:
            raise _explain_not_finite(error, self.source, step) from error
        seconds = time.perf_counter() - started
        self.writer.write(self._metrics_of(step, result, rates, seconds=seconds, data_seconds=data_seconds))
        self.watchdog.step_done(seconds)
        self._notice.see_step(seconds, math.ceil(len(step.packs) / dist.world_size()))
        return result.stop_requested

    def _metrics_of(
        self, step: Step, result: StepResult, rates: dict[str, float], *, seconds: float, data_seconds: float
    ) -> StepMetrics:
        schedule = self._schedule
        names = [source["name"] for source in self.source.store.manifest["sources"]]
        return StepMetrics(
            step=step.number + 1,
            epoch=step.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            rates=rates,
            num_tokens=step.num_tokens,
            num_trained_tokens=step.num_trained_tokens,
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
            metrics=result.metrics,
        )

    def _rates_at(self, number: int) -> dict[str, float]:
        return {name: rate(number) for name, rate in self._rates.items()}

    @contextmanager
    def _observed(self, step: int) -> Iterator[None]:
        with ExitStack() as entered:
            for observer in self.observers:
                entered.enter_context(observer(step))
            yield

    def _validate_if_due(self, steps_done: int) -> None:
        """Evaluate where it is due and not done: after a step, or as a stop kept it from being done there."""
        if self.validation is None or not steps_done:
            return
        ends_epoch = bool(np.isin(steps_done, self._schedule.first_steps[1:]))
        if self.validation.is_due(steps_done, ends_epoch=ends_epoch):
            epoch = self._schedule.step(steps_done - 1).epoch
            self.validation.evaluate(
                self.engine, step=steps_done, epoch=epoch, stop=lambda: self.stop.requested
            )

    def _save_if_due(self, steps_done: int) -> None:
        """Save at each `save_every_steps`, and after the last step."""
        is_last = steps_done == self._schedule.num_steps
        if is_last or steps_done % self.settings.checkpoint.save_every_steps == 0:
            self._save(steps_done)

    def _save(self, steps_done: int) -> None:
        """Save after the rows of its steps, if there is a step and it is not saved yet."""
        if steps_done in (0, self._saved):
            return
        started = time.perf_counter()
        self.writer.sync()
        state = TrainState(
            step=steps_done,
            epoch=self._schedule.step(steps_done - 1).epoch,
            plan_fingerprint=self._schedule.fingerprint,
            world_size=dist.world_size(),
            num_threads=torch.get_num_threads(),
            plan_settings=plan_settings(self._schedule),
            dtype=self.settings.dtype,
            num_evaluations=len(self.validation.done) if self.validation else 0,
        )
        save_checkpoint(self.settings.folder, self.engine, state, keep=self.settings.checkpoint.keep)
        self._saved = steps_done
        self._notice.see_save(time.perf_counter() - started)


@contextmanager
def _memory_failures(pack: IntArray, step: int) -> Iterator[None]:
    """Name the pack for which there was no memory.

    Raises:
        PackTooLarge: in place of torch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PackTooLarge(str(error), pack, step) from error


def _explain_not_finite(error: NotFinite, source: PackSource, step: Step) -> TrainingFailed:
    """Which step, packs and samples it was; all ranks call it, and all say the same."""
    dealt = source.schedule.deal(step)
    found = {
        int(dealt[rank, micro_batch])
        for rank, numbers in enumerate(dist.gather_objects(error.micro_batches))
        for micro_batch in numbers
    } - {IDLE}
    packs = sorted(found) or list(range(len(step.packs)))
    ids = source.store.ids
    samples = [ids[int(i)] for p in packs for i in step.packs[p]]
    return TrainingFailed(
        Problem(
            what=f"{error} in step {step.number + 1}; the weights were not updated",
            got=f"packs {', '.join(map(str, packs))} of {len(step.packs)}, samples {name_samples(samples)}",
            remedy="look at these samples (sftcore inspect), lower train.lr, or raise train.warmup_ratio; "
            "the last checkpoint is good",
        )
    )
