"""A rank's entry point: reads the recipe, then imports what trains it; leaves its exit code in RUN/logs.

In: `deepspeed launcher/worker.py RECIPE`, or srun's tasks. Out: as sftcore/stages/train.py; an exit code.
Invariant: from the moment the recipe is read, the end of this process has a code, whatever it dies of: a
package that can't be imported is the environment's fault (3), not a lost rank (69) that is worth a new try.
Trade-off: torch and DeepSpeed are imported in a function, seconds after the process has begun, so that a
stop signal and a failure on the way are not lost.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import nullcontext
from types import FrameType

from sftcore.config import Recipe
from sftcore.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RANK_LOST,
    EnoughSteps,
    MissingEnvironmentError,
    Problem,
    SftError,
)
from sftcore.hub import require_hub
from sftcore.launcher.ranks import (
    listed_pid,
    redirect_output,
    slurm_rank_variables,
    worker_parser,
    write_code,
)
from sftcore.launcher.terminal import allow_open_files, explained, prepare_streams
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe
from sftcore.runs.claim import with_run
from sftcore.runs.settle import settle
from sftcore.train.stopping import SIGNALS, end_on_stop, leave_codes_with

log = logging.getLogger("sftcore.training")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank; returns the exit code."""
    os.environ.update(slurm_rank_variables(os.environ))
    options = worker_parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank=rank)
    prepare_streams()
    allow_open_files()
    try:
        recipe = with_run(load_recipe(options.recipe, options.overrides), options.run)
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    def leave(code: int) -> None:
        if options.rank_logs:
            write_code(recipe.run_folder, rank, code)

    leave_codes_with(leave)
    end_on_stop("stopped on request before the first step; start again to go on")
    if options.rank_logs and rank != 0:
        redirect_output(recipe.run_folder, rank)
    code = EXIT_FAILED
    try:
        with explained():
            code = _train(recipe, options)
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    finally:
        leave(code)
    return code


def _train(recipe: Recipe, options: argparse.Namespace) -> int:
    try:
        from sftcore import dist
        from sftcore.stages.train import train_recipe
    except ImportError as error:
        remedy = "sftcore doctor names what is missing or broken"
        problem = Problem(what=f"a package can't be imported: {error}", remedy=remedy)
        raise MissingEnvironmentError(problem) from error
    require_hub([recipe])
    recipe = settle(recipe, resume=options.resume)
    for number in SIGNALS:  # what holds outside of training, and until the process ends
        signal.signal(number, _pass_over)
    is_listed = dist.rank() == dist.local_rank()  # on rank 0's machine
    how = {name: getattr(options, name) for name in ("resume", "restart_schedule", "max_steps")}
    try:
        with listed_pid(recipe.run_folder) if is_listed else nullcontext():
            train_recipe(recipe, **how, is_launched=True)
    except EnoughSteps as enough:
        log.info("%s", enough)
        return enough.exit_code
    except RuntimeError as error:
        if not dist.is_about_a_lost_rank(error):
            raise
        what = f"another rank ended or can't be reached: {str(error).splitlines()[0][:200]}"
        print(f"error: {what}; start again to go on from the newest checkpoint", file=sys.stderr)
        return EXIT_RANK_LOST
    return EXIT_DONE


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Handle a stop signal by doing nothing: this rank has already agreed with the others on its end."""


if __name__ == "__main__":
    sys.exit(main())
