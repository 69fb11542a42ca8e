"""Validation: held-out samples -> their exact loss now and then, without gradients.

In: an engine, the store of data.valid. Out: RUN/valid.jsonl, a line for each evaluation; the weights with the
lowest loss in RUN/best.
Invariant: the loss is the recipe's normalisation over the whole set, whatever the world size; it draws
nothing at random, so a run with validation trains the same weights as one without.
Trade-off: the best weights are exported each time they improve (2 bytes a parameter, against 14 for a
checkpoint), so that they can be loaded at any world size and outlive their checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sftcore import dist
from sftcore.amounts import duration
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import DAMAGED, append_jsonl, read_jsonl, sync_entry, write_jsonl
from sftcore.train.batches import all_batches, whole_set
from sftcore.train.engine import Engine
from sftcore.train.export import export_weights
from sftcore.train.outcome import StopAsked, never

log = logging.getLogger(__name__)
VALID, BEST = "valid.jsonl", "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A line of valid.jsonl.

    Args:
        step: optimizer steps done.
        epoch: epoch of the last step done, 0-based.
        valid_loss: mean cross-entropy, normalised as the recipe says; null in the file if it is not finite.
        num_samples: of the set.
        num_trained_tokens: of the set.
        seconds: wall time of the evaluation.
    """

    step: int
    epoch: int
    valid_loss: float
    num_samples: int
    num_trained_tokens: int
    seconds: float


class Validation:
    """The evaluations of a run so far, and the next one."""

    def __init__(
        self, recipe: Recipe, store: TokenStore, tokenizer: Any, *, steps_done: int, num_evaluations: int = 0
    ) -> None:
        """Take up RUN/valid.jsonl, without rows after `steps_done`; all ranks call it.

        Args:
            num_evaluations: that the run's checkpoint knows of.

        Raises:
            UserInputError: rows are missing, or the weights with the lowest loss are.
        """
        self.recipe, self.store, self.tokenizer = recipe, store, tokenizer
        self.path = recipe.run_folder / VALID
        rows = read_jsonl(self.path) if self.path.exists() else []
        self.done = [row for row in _evaluations(rows, self.path) if row.step <= steps_done]
        self._check_whole(num_evaluations)
        dist.barrier()
        if dist.rank() == 0 and rows:
            write_jsonl(self.path, [_row_of(row) for row in self.done])
        self._source = whole_set(
            store, capacity=recipe.batch.capacity, seed=recipe.seed, normalise=recipe.train.normalise
        )

    def _check_whole(self, wanted: int) -> None:
        """Refuse to go on without an evaluation of before: the next would take the lowest one's place."""
        if len({row.step for row in self.done}) < wanted:
            raise UserInputError(
                Problem(
                    what="evaluations that the checkpoint knows of are missing",
                    where=str(self.path),
                    got=f"{len(self.done)} of its steps",
                    allowed=f"{wanted} or more",
                    remedy="put a good copy of the file there, or start the run again: --run DIR",
                )
            )
        if self.recipe.train.keep == "best" and wanted and math.isfinite(self.lowest_loss):
            if not self.best_folder.is_dir():
                raise UserInputError(
                    Problem(
                        what="the weights with the lowest valid loss are gone",
                        where=str(self.best_folder),
                        remedy="put the folder back, or start the run again: --run DIR",
                    )
                )

    def is_due(self, step: int, *, ends_epoch: bool) -> bool:
        """Whether to evaluate after `step` steps, and that was not done yet."""
        every = self.recipe.train.evaluate_every_steps
        is_wanted = ends_epoch or (every is not None and step % every == 0)
        return is_wanted and all(row.step != step for row in self.done)

    def evaluate(self, engine: Engine, *, step: int, epoch: int, stop: StopAsked = never) -> Evaluation:
        """Take the loss after `step` steps; export the weights if it is the lowest. All ranks call it.

        Raises:
            Abandoned: a rank was asked to stop; nothing is written.
        """
        started = time.perf_counter()
        loss = engine.evaluate(all_batches(self._source), stop=stop)
        row = Evaluation(
            step=step,
            epoch=epoch,
            valid_loss=loss,
            num_samples=len(self.store),
            num_trained_tokens=int(self.store.num_trained.sum()),
            seconds=time.perf_counter() - started,
        )
        is_best = loss < self.lowest_loss
        if is_best:
            export_weights(engine, self.tokenizer, self.recipe, folder=self.best_folder)
        self.done.append(row)
        if dist.rank() == 0:
            append_jsonl(self.path, _row_of(row), sync=True)
            mark = ", the lowest so far" if is_best else ""
            log.info("valid loss %.4f after step %d%s (%s)", loss, step, mark, duration(row.seconds))
            if not math.isfinite(loss):
                log.warning("this valid loss is not finite: it is no lowest, whatever follows")
        return row

    @property
    def best_folder(self) -> Path:
        """RUN/best: the weights with the lowest loss."""
        return self.recipe.run_folder / BEST

    @property
    def lowest_loss(self) -> float:
        """Of all evaluations; infinite before the first that is finite."""
        return min((_or_infinite(row.valid_loss) for row in self.done), default=math.inf)

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` evaluations have passed since the lowest loss."""
        return is_exhausted([row.valid_loss for row in self.done], self.recipe.train.patience)

    def promote_best(self, engine: Engine) -> None:
        """Make RUN/best the run's result, or, if no loss was finite, the last weights; all ranks call it."""
        if math.isinf(self.lowest_loss):
            log.warning("no valid loss was finite, so that none is the lowest: keeping the last weights")
            export_weights(engine, self.tokenizer, self.recipe, folder=self.recipe.result_folder)
        elif dist.rank() == 0:
            shutil.rmtree(self.recipe.result_folder, ignore_errors=True)
            os.replace(self.best_folder, self.recipe.result_folder)
            sync_entry(self.recipe.run_folder)
        dist.barrier()


def is_exhausted(losses: list[float], patience: int | None) -> bool:
    """Whether the last `patience` losses hold no new lowest.

    >>> is_exhausted([3.0, 2.0, 2.5, 2.4], 2), is_exhausted([3.0, 2.0, 2.5, 1.9], 2)
    (True, False)

    A loss that is not finite is higher than any other: it counts as an evaluation, and is no lowest.

    >>> is_exhausted([math.nan, 3.0, 2.0], 1), is_exhausted([math.nan, 3.0, math.nan], 1)
    (False, True)
    """
    if patience is None or not losses:
        return False
    known = [_or_infinite(loss) for loss in losses]
    return len(known) - 1 - known.index(min(known)) >= patience


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _row_of(evaluation: Evaluation) -> dict[str, Any]:
    """A line of valid.jsonl; JSON has no word for a loss that is not finite, which is null there."""
    loss = evaluation.valid_loss
    return asdict(evaluation) | {"valid_loss": loss if math.isfinite(loss) else None}


def _evaluations(rows: Iterable[dict[str, Any]], path: Path) -> Iterator[Evaluation]:
    names = {field.name for field in fields(Evaluation)}
    for number, row in enumerate(rows, 1):
        loss = row.get("valid_loss")
        is_row = row.keys() == names and type(row["step"]) is int and isinstance(loss, int | float | None)
        if not is_row:
            what = "no evaluation of a run"
            raise UserInputError(Problem(what=what, where=f"{path}:{number}", remedy=DAMAGED))
        yield Evaluation(**row | {"valid_loss": math.nan if loss is None else loss})
