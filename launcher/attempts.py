"""`python -m launcher.attempts begin|end RECIPE ...`: the batch script's bookkeeping around a job's ranks.

In: worker.py's arguments; SLURM_JOB_ID, SFTCORE_WORLD (number of ranks). Out: RUN/attempts.jsonl; the exit
code that the ranks agreed on.
Invariant: a job is queued again without end only while every attempt leaves a newer checkpoint than the one
before.
Trade-off: an attempt that was killed on its way to the first checkpoint counts as one without progress, so
the limit is 3 (SFTCORE_RETRIES), not 1. No torch is imported: about 0.5 s a call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.ranks import agreed_code, forget_codes, read_codes, worker_parser
from launcher.run_folder import with_run
from sftcore.errors import EXIT_DONE, Problem, SftError, TrainingFailed
from sftcore.fsio import append_jsonl, read_jsonl
from sftcore.recipe import load_recipe

ATTEMPTS = "attempts.jsonl"
RETRIES = 3


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    options = worker_parser().parse_args(arguments[1:])
    try:
        run = with_run(load_recipe(options.recipe, options.overrides), options.run).run_folder
        if arguments[0] == "begin":
            begin_attempt(run, os.environ)
        else:
            print(agreed_code(read_codes(run), int(os.environ["SFTCORE_WORLD"])))
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def begin_attempt(run: Path, environment: Mapping[str, str]) -> None:
    """Note that this job starts its ranks now, and at which step.

    Raises:
        TrainingFailed: the job's last attempts, one more than it may be retried, all began at this step.
    """
    job, retries = environment["SLURM_JOB_ID"], int(environment.get("SFTCORE_RETRIES") or RETRIES)
    rows = read_jsonl(run / ATTEMPTS) if (run / ATTEMPTS).is_file() else []
    step = newest_step(run)
    idle = num_idle([row for row in rows if row["job"] == job], step)
    if idle > retries:
        remedy = "read the job's log and RUN/logs; a new job tries again"
        raise TrainingFailed(
            Problem(what=f"{idle} attempts in a row made no progress past step {step}", remedy=remedy)
        )
    forget_codes(run)
    run.mkdir(parents=True, exist_ok=True)
    append_jsonl(run / ATTEMPTS, {"job": job, "step": step, "host": os.uname().nodename})


def num_idle(attempts: Sequence[Mapping[str, Any]], step: int) -> int:
    """How many of the last attempts began where the run still is.

    >>> num_idle([{"step": 0}, {"step": 50}, {"step": 50}], 50)
    2
    """
    count = 0
    while count < len(attempts) and attempts[-1 - count]["step"] == step:
        count += 1
    return count


def newest_step(run: Path) -> int:
    """Steps done at the newest committed checkpoint; 0 without one."""
    folders = (run / "checkpoints").glob("step-*/COMMITTED")
    return max((int(file.parent.name.removeprefix("step-")) for file in folders), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
