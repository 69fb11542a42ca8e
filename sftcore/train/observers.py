"""Observers: what looks at the steps of a run without changing them; each is entered around every step.

In: an objective about to train, `DebugOptions`. Out: RUN/debug/{norms.jsonl, trace.json, top.txt}; messages.
Invariant: an observer is a function from a step's number (1-based; 0 for the rehearsal) to a context manager,
and the run itself is the ordinary one: the same steps, weights and checkpoints.
Trade-off: anomaly detection looks at every module's output and every gradient on the host, several times the
cost of a step; that is what it is for, and it is off unless asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sftcore.amounts import counted
from sftcore.errors import Problem, TrainingFailed
from sftcore.fsio import append_jsonl, atomic_file

log = logging.getLogger("sftcore.debug")
FOLDER, NORMS, TRACE, TOP = "debug", "norms.jsonl", "trace.json", "top.txt"
PROFILE_AFTER, PROFILE_STEPS = 1, 3  # the first step allocates
NUM_SHOWN = 10
REHEARSAL = 0  # in the place of a step's number
Observer = Callable[[int], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugOptions:
    """What to look at; by default nothing.

    Args:
        anomaly: name the first tensor that is not finite; write norms per layer.
        profile: trace three steps.
    """

    anomaly: bool = False
    profile: bool = False


@contextmanager
def observing(options: DebugOptions, model: torch.nn.Module, run: Path) -> Iterator[list[Observer]]:
    """The observers that are asked for; they are closed at the end of the block."""
    observers: list[NormRecorder | Profiler] = []
    folder = run / FOLDER
    if options.anomaly:
        observers.append(NormRecorder(model, folder))
    if options.profile:
        observers.append(Profiler(folder))
    if observers:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield list(observers)
    finally:
        for observer in observers:
            observer.close()


class NormRecorder:
    """Norms of every layer's output and of every parameter's gradient; the first that is not finite."""

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        self.first_bad = ""
        self._folder = folder
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

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Write the step's norms; those of the rehearsal are of no step and go.

        Raises:
            TrainingFailed: something is not finite; it is named.
        """
        with self._anomalies_explained():
            yield
        norms = self.take()
        if step != REHEARSAL:
            append_jsonl(self._folder / NORMS, {"step": step, **norms})

    @contextmanager
    def _anomalies_explained(self) -> Iterator[None]:
        """Autograd's anomaly detection, with the tensor's name in front of its message."""
        try:
            with torch.autograd.set_detect_anomaly(True):
                yield
        except (RuntimeError, TrainingFailed) as error:
            if not self.first_bad and "returned nan values" not in str(error):
                raise
            first = self.first_bad or "a tensor inside of a layer's backward"
            remedy = "look at what goes into it: RUN/debug/norms.jsonl has the norms of the steps before"
            what = f"first tensor that is not finite: {first}"
            got = str(error).splitlines()[0][:200]
            raise TrainingFailed(Problem(what=what, got=got, remedy=remedy)) from error

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


class Profiler:
    """A trace of `PROFILE_STEPS` steps, and the operations that take longest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_steps = 0
        self._profile: profile | None = None

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Begin before the first traced step, and write after the last."""
        if step != REHEARSAL and self._num_steps == PROFILE_AFTER:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.__enter__()
        yield
        self._num_steps += step != REHEARSAL
        if self._profile is not None and self._num_steps == PROFILE_AFTER + PROFILE_STEPS:
            self._finish()

    def close(self) -> None:
        """Write what there is of a trace."""
        if self._profile is not None:
            self._finish()
        elif self._num_steps <= PROFILE_AFTER:
            log.warning("nothing was profiled: the run has %s", counted(self._num_steps, "step"))

    def _finish(self) -> None:
        assert self._profile is not None
        self._profile.__exit__(None, None, None)
        self._profile.export_chrome_trace(str(self._folder / TRACE))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=key, row_limit=NUM_SHOWN, max_name_column_width=40)
        with atomic_file(self._folder / TOP) as handle:
            handle.write(table)
        log.info("%s\ntrace: %s (chrome://tracing, ui.perfetto.dev)", table, self._folder / TRACE)
        self._profile = None
