"""How long ahead of its end a job is asked to stop: from what a stop of this recipe may take.

In: a recipe, sbatch's options. Out: seconds; `--signal`, checked against the time limit.
Invariant: a limit that is no longer than the notice is refused, and a notice of your own that is shorter than
a stop may take is warned of, both by name, before anything is queued.
Trade-off: the times are guesses on the slow side, since a login node knows neither the GPUs nor the disk: a
notice that is 100 s too long costs 100 s an attempt, one that is too short costs the steps since the last
checkpoint. Ranks measure both and say so where the notice is short (`StopNotice`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping

from sftcore.config import Recipe
from sftcore.errors import Problem, SftError, UserInputError
from sftcore.fsio import fingerprint_of
from sftcore.train.stopping import LOOK_SECONDS

log = logging.getLogger("sftcore.notice")
MIN_SECONDS, MAX_SECONDS = 180, 3600
START_SECONDS = 60  # until ranks see the signal: Slurm looks at its clock twice a minute
GPU_FLOPS, CPU_FLOPS = 40e12, 20e9  # of a rank: a third of an L4's bfloat16 rate; a core without bfloat16
DISK_BYTES = 0.3e9  # a second: a shared disk that others use, too
STATE_BYTES = 14  # of a trained parameter: float32 master and two moments, bfloat16 weight
DECIDING = ("task", "model", "adapter", "batch", "matching")  # sections that decide a notice
SIGNAL = re.compile(r"B:(?:USR1|10)@(\d+)")


def notice_seconds(recipe: Recipe, *, has_gpus: bool) -> int:
    """Seconds from the signal to the end that a stop of this recipe may need.

    A step is given up between packs, so that a pack counts, not the step: forward and backward of a full one,
    6 FLOPs a weight and token.
    """
    try:
        from sftcore.model.cost import measure_recipe

        cost = measure_recipe(recipe)
    except SftError as error:  # a model that only the nodes can reach, or one that the job will refuse
        log.info("the notice is %d s: the model can't be measured here (%s)", MIN_SECONDS, error)
        return MIN_SECONDS
    rate = GPU_FLOPS if has_gpus else CPU_FLOPS
    piece = max(LOOK_SECONDS, 6 * cost.num_parameters * recipe.batch.capacity / rate)
    save = STATE_BYTES * cost.num_trained_parameters / DISK_BYTES
    needed = START_SECONDS + 1.5 * piece + save
    return int(min(MAX_SECONDS, max(MIN_SECONDS, math.ceil(needed / 10) * 10)))


def longest_notice(recipes: Iterable[Recipe], *, has_gpus: bool) -> int:
    """The notice that does for each of these recipes; those of one model and capacity are measured once."""
    kinds = {
        fingerprint_of([recipe.model_dump(mode="json")[key] for key in DECIDING]): recipe
        for recipe in recipes
    }
    found = (notice_seconds(recipe, has_gpus=has_gpus) for recipe in kinds.values())
    return max(found, default=MIN_SECONDS)


def with_notice(options: Mapping[str, str], needed: int) -> dict[str, str]:
    """sbatch's options with the notice of a stop, unless they hold one.

    Raises:
        UserInputError: the time limit is no longer than the notice.
    """
    own = options.get("signal")
    given = SIGNAL.fullmatch(own) if own is not None else None
    notice = needed if own is None else int(given[1]) if given else 0
    if notice < needed:
        log.warning(
            "--sbatch signal=%s: a stop may take %d s here (a pack and a save): ask for B:USR1@%d, or steps"
            " since the last checkpoint are lost at the time limit",
            own,
            needed,
            needed,
        )
    limit = limit_seconds(options.get("time", ""))
    if limit is not None and limit <= notice:
        raise UserInputError(
            Problem(
                what="the time limit is no longer than the notice that a stop needs",
                where="--time",
                got=f"{options['time']} ({limit} s)",
                allowed=f"more than {notice} s",
                remedy="ask for more time, or for a shorter notice: --sbatch signal=B:USR1@SECONDS",
            )
        )
    return {"signal": f"B:USR1@{needed}", **options}


def limit_seconds(text: str) -> int | None:
    """A time limit as sbatch reads it; None for what it may read otherwise.

    >>> [limit_seconds(text) for text in ("10", "2:30", "4:00:00", "1-0", "1-2:30", "UNLIMITED", "")]
    [600, 150, 14400, 86400, 95400, None, None]
    """
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
