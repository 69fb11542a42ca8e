"""Looking into a run: where numbers stop being finite, what costs the time, whether a step can be learned.

In: an engine about to train; `DebugOptions`. Out: RUN/debug/{norms.jsonl, trace.json, top.txt}; messages.
Invariant: the run itself is the ordinary one: the engine is wrapped, steps and checkpoints stay the same.
Trade-off: anomaly detection looks at every module's output and every gradient on the host, several times the
cost of a step; that is what it is for, and it is off unless asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from sftcore.amounts import counted
from sftcore.batching.collate import Batch
from sftcore.batching.schedule import Schedule
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.errors import Problem, TrainingFailed, UserInputError
from sftcore.fsio import append_jsonl, atomic_file
from sftcore.train.batches import rank_batches
from sftcore.train.engine import Engine
from sftcore.train.outcome import StepResult, StopAsked, never

log = logging.getLogger("sftcore.debug")
FOLDER, NORMS, TRACE, TOP = "debug", "norms.jsonl", "trace.json", "top.txt"
PROFILE_AFTER, PROFILE_STEPS = 1, 3  # the first step allocates
OVERFIT_LOSS, OVERFIT_STEPS = 0.01, 500
NUM_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugOptions:
    """What to look at; by default nothing.

    Args:
        anomaly: name the first tensor that is not finite; write norms per layer.
        max_steps: stop after a checkpoint after this many steps; None: at the end.
        profile: trace three steps.
    """

    anomaly: bool = False
    max_steps: int | None = None
    profile: bool = False


class DebuggedEngine:
    """An engine whose steps are looked at; takes the place of `Engine` in the loop."""

    def __init__(self, engine: Engine, run: Path, options: DebugOptions) -> None:
        self.engine, self.options = engine, options
        self.folder = run / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_steps = 0
        self._profile: profile | None = None
        self._norms = NormRecorder(engine.loss_model) if options.anomaly else None

    def step(
        self, batches: Sequence[Batch], *, seeds: Sequence[int], lr: float, stop: StopAsked = never
    ) -> StepResult:
        """As `Engine.step`.

        Raises:
            TrainingFailed: anomaly detection found a tensor that is not finite; it is named.
        """
        if self.options.profile and self.num_steps == PROFILE_AFTER:
            self._start_profile()
        if self._norms is None:
            result = self.engine.step(batches, seeds=seeds, lr=lr, stop=stop)
        else:
            with _anomalies_explained(self._norms):
                result = self.engine.step(batches, seeds=seeds, lr=lr, stop=stop)
            append_jsonl(self.folder / NORMS, {"step": self.num_steps + 1, **self._norms.take()})
        self.num_steps += 1
        if self._profile is not None and self.num_steps == PROFILE_AFTER + PROFILE_STEPS:
            self._finish_profile()
        is_enough = self.num_steps == self.options.max_steps
        return replace(result, stop_requested=result.stop_requested or is_enough)

    def rehearse(self, batch: Batch) -> None:
        """As `Engine.rehearse`; its norms are of no step and go.

        Raises:
            TrainingFailed: as in `step`.
        """
        if self._norms is None:
            self.engine.rehearse(batch)
            return
        with _anomalies_explained(self._norms):
            self.engine.rehearse(batch)
        self._norms.take()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)  # all else is the engine's

    def close(self) -> None:
        """End what is open; `Engine.close` is for the owner."""
        if self._profile is not None:
            self._finish_profile()
        elif self.options.profile and self.num_steps <= PROFILE_AFTER:
            log.warning("nothing was profiled: the run has %s", counted(self.num_steps, "step"))
        if self._norms is not None:
            self._norms.close()

    def _start_profile(self) -> None:
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
        self._profile.__enter__()

    def _finish_profile(self) -> None:
        assert self._profile is not None
        self._profile.__exit__(None, None, None)
        self._profile.export_chrome_trace(str(self.folder / TRACE))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=key, row_limit=NUM_SHOWN, max_name_column_width=40)
        with atomic_file(self.folder / TOP) as handle:
            handle.write(table)
        log.info("%s\ntrace: %s (chrome://tracing, ui.perfetto.dev)", table, self.folder / TRACE)
        self._profile = None


@contextmanager
def debugged(engine: Engine, run: Path, options: DebugOptions) -> Iterator[Engine]:
    """The engine itself, or wrapped for the block if anything is to be looked at."""
    if options == DebugOptions():
        yield engine
        return
    wrapped = DebuggedEngine(engine, run, options)
    try:
        yield cast(Engine, wrapped)
    finally:
        wrapped.close()


class NormRecorder:
    """Norms of every layer's output and of every parameter's gradient; the first that is not finite."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.first_bad = ""
        self._squares: dict[str, dict[str, float]] = {"outputs": {}, "gradients": {}}
        self._handles = [
            module.register_forward_hook(partial(self._see_output, name))
            for name, module in model.named_modules()
            if not list(module.children())
        ]
        self._handles += [
            parameter.register_hook(partial(self._see, "gradients", name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _see_output(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                self._see("outputs", name, tensor.detach())
        if self.first_bad:
            raise RuntimeError(self.first_bad)

    def _see(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        square = float(tensor.detach().double().square().sum())
        self._squares[kind][name] = self._squares[kind].get(name, 0.0) + square
        if not self.first_bad and not torch.isfinite(tensor).all():
            what = "output" if kind == "outputs" else "gradient"
            self.first_bad = f"the {what} of {name}, shape {tuple(tensor.shape)}"

    def take(self) -> dict[str, dict[str, float]]:
        """{"outputs" | "gradients": {name: norm}} since the last call."""
        norms = {
            kind: {name: value**0.5 for name, value in found.items()} for kind, found in self._squares.items()
        }
        self._squares = {"outputs": {}, "gradients": {}}
        return norms

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def _anomalies_explained(norms: NormRecorder) -> Iterator[None]:
    """Autograd's anomaly detection, with the tensor's name in front of its message.

    Raises:
        TrainingFailed: something is not finite.
    """
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    except (RuntimeError, TrainingFailed) as error:
        if not norms.first_bad and "returned nan values" not in str(error):
            raise
        first = norms.first_bad or "a tensor inside of a layer's backward"
        remedy = "look at what goes into it: RUN/debug/norms.jsonl has the norms of the steps before"
        what = f"first tensor that is not finite: {first}"
        raise TrainingFailed(
            Problem(what=what, got=str(error).splitlines()[0][:200], remedy=remedy)
        ) from error


def check_overfit(recipe: Recipe) -> None:
    """Refuse what keeps a loss above zero.

    Raises:
        UserInputError: label smoothing or z-loss.
    """
    bad = {"train.label_smoothing": recipe.train.label_smoothing, "train.z_loss": recipe.train.z_loss}
    problems = [
        Problem(what="a loss with this can't reach 0", where=key, got=str(value), remedy=f"--set {key}=0")
        for key, value in bad.items()
        if value
    ]
    if problems:
        raise UserInputError(*problems)


def overfit_one_step(recipe: Recipe, engine: Engine, schedule: Schedule, store: TokenStore) -> str:
    """Repeat the plan's first step, at the peak learning rate, until its loss is below `OVERFIT_LOSS`.

    Returns:
        what happened.

    Raises:
        TrainingFailed: `OVERFIT_STEPS` repetitions were not enough.
    """
    batches, seeds = rank_batches(recipe, schedule, store, schedule.step(0))
    first = loss = float("nan")
    for number in range(1, OVERFIT_STEPS + 1):
        loss = engine.step(batches, seeds=seeds, lr=recipe.train.peak_lr).loss
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
