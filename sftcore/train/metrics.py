"""Metrics: one JSON object a step in RUN/metrics.jsonl, the same numbers as TensorBoard events, a live line.

In: a step's content, result and times. Out: lines that scripts rely on (keys below), flushed step by step.
Invariant: after a resume the file holds each step once: rows after the checkpoint's step are taken out
first.
Trade-off: one append of about 400 bytes a step, without fsync; a power cut may cost the last lines, which a
resume trains again anyway.
"""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from sftcore import dist
from sftcore.fsio import append_jsonl, read_jsonl, write_jsonl

log = logging.getLogger(__name__)
LIVE_LINE_SECONDS = 2.0
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """A line of metrics.jsonl; `step` is 1-based, counts are over all ranks."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    num_trained_tokens: int
    num_pad_tokens: int
    num_samples: int
    num_packs: int
    num_samples_by_source: dict[str, int]
    elapsed_seconds: float
    step_seconds: float
    data_seconds: float
    tokens_per_second: float
    trained_tokens_per_second: float
    rank_imbalance: float
    peak_memory_bytes: int


class MetricsWriter:
    """Writes on rank 0; a context manager."""

    def __init__(self, run: Path, *, steps_done: int, num_steps: int, tensorboard: bool) -> None:
        """Open the run's metrics, dropping rows after `steps_done`."""
        self.path = run / METRICS
        self.num_steps = num_steps
        self.earlier_seconds = keep_first_steps(self.path, steps_done) if dist.rank() == 0 else 0.0
        self.started = self.last_line = time.perf_counter()
        self.events = None
        if tensorboard and dist.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(run / "tensorboard"), purge_step=steps_done + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.events:
            self.events.close()

    @property
    def elapsed_seconds(self) -> float:
        """Wall clock since the first step began, over interruptions."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def write(self, metrics: StepMetrics) -> None:
        """Append a step; show a live line every LIVE_LINE_SECONDS and at the last step."""
        if dist.rank() != 0:
            return
        append_jsonl(self.path, asdict(metrics))
        if self.events:
            for name in ("loss", "grad_norm", "lr", "tokens_per_second", "trained_tokens_per_second"):
                self.events.add_scalar(f"train/{name}", asdict(metrics)[name], metrics.step)
        now = time.perf_counter()
        if now - self.last_line >= LIVE_LINE_SECONDS or metrics.step == self.num_steps:
            self.last_line = now
            remaining = metrics.step_seconds * (self.num_steps - metrics.step)
            log.info(
                "step %d/%d  loss %.4f  grad norm %.2f  %.0f tokens/s, %.0f trained  about %.0f s left",
                metrics.step,
                self.num_steps,
                metrics.loss,
                metrics.grad_norm,
                metrics.tokens_per_second,
                metrics.trained_tokens_per_second,
                remaining,
            )


def keep_first_steps(path: Path, steps_done: int) -> float:
    """Drop rows after `steps_done`, in place; returns the elapsed seconds of the last row kept."""
    if not path.exists():
        return 0.0
    rows = [row for row in read_jsonl(path) if row["step"] <= steps_done]
    write_jsonl(path, rows)
    return float(rows[-1]["elapsed_seconds"]) if rows else 0.0


def peak_memory_bytes() -> int:
    """This rank's peak: GPU bytes allocated by torch, or the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
