"""Trackers: the numbers of metrics.jsonl, sent on to TensorBoard, trackio or Weights & Biases.

In: names and values at a step. Out: event files in RUN/tensorboard; a run in the chosen tracker.
Invariant: metrics.jsonl stays the record; a tracker that is not installed is refused before training begins.
Trade-off: after a resume TensorBoard drops the steps that are trained again, the others keep both lines.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

from sftcore.config import Recipe
from sftcore.errors import MissingEnvironmentError, Problem


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Flush."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, recipe: Recipe, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(recipe.run_folder / "tensorboard"), purge_step=steps_done + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._events.close()


REMEDIES = {"wandb": "log in (wandb login), or set WANDB_MODE=offline", "trackio": "see what it says"}


class RunTracker:
    """trackio or wandb, which share `init`, `log` and `finish`; a run is named as the recipe's.

    Raises:
        MissingEnvironmentError: it can't be started; wandb without a key, for one.
    """

    def __init__(self, module: str, recipe: Recipe) -> None:
        self._module: Any = importlib.import_module(module)
        own_files = {"dir": str(recipe.run_folder)} if module == "wandb" else {}
        options = {"project": recipe.tracking.project, "name": recipe.name, **own_files}
        try:
            self._module.init(config=recipe.model_dump(mode="json"), **options)
        except Exception as error:  # each has its own kinds
            what = f"{module} can't be started: {error}"
            raise MissingEnvironmentError(
                Problem(what=what, where="tracking.to", remedy=REMEDIES[module])
            ) from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""
        self._module.log(values, step=step)

    def close(self) -> None:
        """Flush."""
        self._module.finish()


def check_tracker(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        MissingEnvironmentError: with the command that installs it.
    """
    name = recipe.tracking.to
    if name and importlib.util.find_spec(name) is None:
        raise MissingEnvironmentError(
            Problem(what=f"{name} is not installed", where="tracking.to", remedy=f"pip install {name}")
        )


def open_trackers(recipe: Recipe, *, steps_done: int) -> list[Tracker]:
    """Those that the recipe asks for."""
    trackers: list[Tracker] = [TensorBoard(recipe, steps_done)] if recipe.tracking.tensorboard else []
    return [*trackers, RunTracker(recipe.tracking.to, recipe)] if recipe.tracking.to else trackers
