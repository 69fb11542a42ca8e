"""Whether a run can go on from a path that a user gave: is it a checkpoint at all, and of this plan.

In: a path, a checkpoint's state. Out: nothing, a reason, or a `UserInputError`.
Invariant: a path that is no checkpoint is called what it is, with checkpoints that there are.
Trade-off: a folder counts as a checkpoint by its name or one of its files, whole or not: damage has
reasons of its own in `checkpoint`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from sftcore.batching.schedule import Schedule
from sftcore.errors import Problem, UserInputError
from sftcore.train.checkpoint import COMMITTED, MANIFEST, STATE, STEP, TrainState, checkpoints_of

log = logging.getLogger(__name__)


def why_no_checkpoint(path: Path, run: Path) -> str:
    """What a path is that is no checkpoint at all, with the run's there or, if none, those of `run`.

    Empty for a checkpoint's folder, whole or not.
    """
    parts = (COMMITTED, MANIFEST, STATE, "ds")
    if path.is_dir() and (STEP.fullmatch(path.name) or any((path / part).exists() for part in parts)):
        return ""
    if not path.exists():
        what = "there is nothing"
    elif not path.is_dir():
        what = "this is a file, and a checkpoint is a folder"
    elif checkpoints_of(path) or (path.name == "checkpoints" and checkpoints_of(path.parent)):
        what = "this folder holds a run's checkpoints and is none of them"
    else:
        what = "this folder is no checkpoint"
    found = next((held for place in (path, *path.parents[:3], run) if (held := checkpoints_of(place))), [])
    return f"{what} (checkpoints: {', '.join(map(str, found[::-1][:3])) or f'none in {run}'})"


def check_resumable(
    folder: Path, state: TrainState, *, schedule: Schedule, plan_settings: dict[str, Any]
) -> None:
    """Refuse a checkpoint of another plan; warn of another thread count.

    Raises:
        UserInputError: this run can't go on from that checkpoint; the settings that differ are named.
    """
    known = state.plan_fingerprint
    if known != schedule.fingerprint and known != schedule.earlier_fingerprint:
        now = json.loads(json.dumps(plan_settings))
        differing = {key: (value, now.get(key)) for key, value in state.plan_settings.items()}
        differing = {key: pair for key, pair in differing.items() if pair[0] != pair[1]}
        raise UserInputError(
            Problem(
                what="this checkpoint belongs to another plan",
                where=str(folder),
                got=", ".join(f"{key} {new}" for key, (_, new) in differing.items()),
                allowed=", ".join(f"{key} {old}" for key, (old, _) in differing.items()),
                remedy="use the recipe it was made with, or start a new plan from its weights and optimizer: "
                "--resume PATH --restart-schedule",
            )
        )
    if state.num_threads != torch.get_num_threads():
        log.warning(
            "resuming with %d threads instead of %d: results may differ in the last bits",
            torch.get_num_threads(),
            state.num_threads,
        )
