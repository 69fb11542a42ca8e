"""Metrics: one JSON object a step in RUN/metrics.jsonl, the same numbers as TensorBoard events, a live line.

In: a step's content, result and times. Out: lines that scripts rely on (keys below), flushed step by step.
Invariant: after a resume the file holds each step once: rows after the checkpoint's step are taken out
first.
Trade-off: one append of about 400 bytes a step, without fsync until a checkpoint is saved: a power cut may
cost the lines after it, whose steps a resume trains again anyway.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sftcore import dist
from sftcore.amounts import duration
from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import DAMAGED, append_jsonl, read_jsonl, sync_file, write_jsonl
from sftcore.train.devices import peak_flops_of
from sftcore.train.tracking import open_trackers

log = logging.getLogger(__name__)
LIVE_LINE_SECONDS = 2.0
METRICS = "metrics.jsonl"
TRACKED = ("loss", "grad_norm", "tokens_per_second", "trained_tokens_per_second", "mfu")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """A line of metrics.jsonl; `step` is 1-based, counts are over all ranks.

    `elapsed_seconds`, the wall clock since the first step began, joins them when the line is written.

    Args:
        rates: by name, each a key of the line.
        metrics: the objective's sums by name, each a key of the line.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    rates: dict[str, float]
    num_tokens: int
    num_trained_tokens: int
    num_samples: int
    num_packs: int
    num_samples_by_source: dict[str, int]
    step_seconds: float
    data_seconds: float
    compute_seconds: float
    tokens_per_second: float
    trained_tokens_per_second: float
    mfu: float | None
    rank_imbalance: float
    peak_memory_bytes: int
    metrics: dict[str, float]

    def row(self) -> dict[str, Any]:
        """What is written.

        Raises:
            ValueError: an objective's metric or a rate has another number's name.
        """
        row: dict[str, Any] = {}
        for name, value in asdict(self).items():
            parts = value if name in ("rates", "metrics") else {name: value}
            if taken := row.keys() & parts.keys():
                raise ValueError(f"metrics.jsonl has numbers of these names already: {sorted(taken)}")
            row |= parts
            if name == "num_trained_tokens":
                row["num_pad_tokens"] = 0  # packs have none; readers of the file count on the key
        return row


class MetricsWriter:
    """Writes on rank 0; a context manager."""

    def __init__(self, recipe: Recipe, *, steps_done: int, num_steps: int) -> None:
        """Open the run's metrics, dropping rows after `steps_done`."""
        self.path = recipe.run_folder / METRICS
        self.num_steps = num_steps
        self.earlier_seconds = keep_first_steps(self.path, steps_done) if dist.rank() == 0 else 0.0
        self.trackers = open_trackers(recipe, steps_done=steps_done) if dist.rank() == 0 else []

    def __enter__(self) -> MetricsWriter:
        """The first step begins."""
        self.started = self.last_line = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self.trackers:
            tracker.close()

    @property
    def elapsed_seconds(self) -> float:
        """Wall clock since the first step began, over interruptions."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def write(self, metrics: StepMetrics) -> None:
        """Append a step; show a live line every LIVE_LINE_SECONDS and at the last step."""
        if dist.rank() != 0:
            return
        row = metrics.row()
        append_jsonl(self.path, row | {"elapsed_seconds": self.elapsed_seconds})
        names = (*TRACKED, *metrics.rates, *metrics.metrics)
        self.track({f"train/{name}": row[name] for name in names if row[name] is not None}, metrics.step)
        now = time.perf_counter()
        if now - self.last_line >= LIVE_LINE_SECONDS or metrics.step == self.num_steps:
            self.last_line = now
            remaining = metrics.step_seconds * (self.num_steps - metrics.step)
            log.info(
                "step %d/%d  loss %.4f  grad norm %.2f  %.0f tokens/s, %.0f trained%s  about %s left",
                metrics.step,
                self.num_steps,
                metrics.loss,
                metrics.grad_norm,
                metrics.tokens_per_second,
                metrics.trained_tokens_per_second,
                "" if metrics.mfu is None else f", {metrics.mfu:.1%} MFU",
                duration(round(remaining)),
            )

    def sync(self) -> None:
        """Have the rows on the disk: before a checkpoint that counts their steps."""
        if dist.rank() == 0:
            sync_file(self.path)

    def track(self, values: dict[str, float], step: int) -> None:
        """Send numbers to all trackers."""
        for tracker in self.trackers:
            tracker.log(values, step)


def keep_first_steps(path: Path, steps_done: int) -> float:
    """Drop rows after `steps_done`, in place; returns the elapsed seconds of the last row kept.

    Raises:
        UserInputError: rows of steps that a checkpoint counts are damaged or missing.
    """
    if not path.exists():
        if steps_done:
            log.warning("%s is gone: it will begin after step %d", path, steps_done)
        return 0.0
    rows = read_jsonl(path, appended=True)
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int or not isinstance(row.get("elapsed_seconds"), int | float):
            what = "no step of a run"
            raise UserInputError(Problem(what=what, where=f"{path}:{number}", remedy=DAMAGED))
    kept = [row for row in rows if row["step"] <= steps_done]
    numbers = [row["step"] for row in kept]
    if kept and numbers != list(range(numbers[0], steps_done + 1)) or (steps_done and not kept):
        what, got = "lacks steps that the checkpoint counts", f"{len(kept)} rows up to step {steps_done}"
        raise UserInputError(Problem(what=what, where=str(path), got=got, remedy=DAMAGED))
    write_jsonl(path, kept)
    return float(kept[-1]["elapsed_seconds"]) if kept else 0.0


def model_flops_utilisation(flops: float, seconds: float) -> float | None:
    """FLOPs that a step's real tokens need / FLOPs that all ranks' GPUs could do; None without a known peak.

    Pads, recomputation and communication are not counted as work (PaLM, arXiv 2204.02311, appendix B).
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops_of(name)
    return flops / (seconds * peak * dist.world_size()) if peak else None
