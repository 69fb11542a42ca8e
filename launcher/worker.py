"""A rank's entry point: reads the recipe, then imports what trains it; leaves its exit code in RUN/logs.

In: `deepspeed launcher/worker.py RECIPE`, or srun's tasks. Out: as launcher/training.py; an exit code.
Invariant: from the moment the recipe is read, the end of this process has a code, whatever it dies of: a
package that can't be imported is the environment's fault (3), not a lost rank (69) that is worth a new try.
Trade-off: torch and DeepSpeed are imported in a function, seconds after the process has begun, so that a
stop signal and a failure on the way are not lost.
"""

from __future__ import annotations

import argparse
import os
import sys

from launcher.precision import settle
from launcher.ranks import redirect_output, slurm_rank_variables, worker_parser, write_code
from launcher.run_folder import with_run
from launcher.terminal import allow_open_files, explained, prepare_streams
from sftcore.config import Recipe
from sftcore.errors import EXIT_FAILED, MissingEnvironmentError, Problem, SftError
from sftcore.hub import require_hub
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe
from sftcore.train.stopping import end_on_stop, leave_codes_with


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
        from launcher.training import run_rank
    except ImportError as error:
        remedy = "sftcore doctor names what is missing or broken"
        problem = Problem(what=f"a package can't be imported: {error}", remedy=remedy)
        raise MissingEnvironmentError(problem) from error
    require_hub([recipe])
    return run_rank(
        settle(recipe, resume=options.resume),
        resume=options.resume,
        restart_schedule=options.restart_schedule,
        max_steps=options.max_steps,
    )


if __name__ == "__main__":
    sys.exit(main())
