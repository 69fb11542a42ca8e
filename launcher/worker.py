"""What every rank runs: a recipe -> a trained model.

In: `deepspeed launcher/worker.py RECIPE`, or `train_recipe` called in this process. Out: a finished run
folder.
Invariant: everything that takes long on the CPU (selection, tokenising) is done before ranks wait for each
other; one rank does it, under a lock, and the others find it done.
Trade-off: every rank reads the recipe and plans for itself (milliseconds) instead of being sent a plan.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from launcher.preflight import describe_plan, measure_recipe
from launcher.run_folder import open_run, record_seconds, with_run
from launcher.stages import prepare
from sftcore import dist
from sftcore.batching.schedule import Schedule
from sftcore.config import Recipe
from sftcore.errors import Problem, SftError, UserInputError
from sftcore.fsio import write_json
from sftcore.log import setup_logging
from sftcore.model.encoder import load_encoder_for_training
from sftcore.model.load import (
    LossModel,
    checkpoint_activations,
    load_classifier_for_training,
    load_for_training,
)
from sftcore.recipe import deepspeed_file, load_recipe
from sftcore.settings import NUM_CLASSES
from sftcore.train.checkpoint import (
    check_resumable,
    for_this_world,
    newest_usable,
    read_state,
    why_not_usable,
)
from sftcore.train.ds_config import read_ds_config, zero_stage
from sftcore.train.engine import Engine, check_engine, init_process_group
from sftcore.train.export import export_weights
from sftcore.train.loop import make_schedule, plan_settings, run_steps
from sftcore.train.stopping import StopRequest

log = logging.getLogger("sftcore.worker")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a recipe as one of several ranks.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    parser.add_argument("--run", default=None, metavar="DIR")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH")
    parser.add_argument("--restart-schedule", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by the launcher")
    options = parser.parse_args(arguments)
    setup_logging(rank=dist.rank())
    try:
        recipe = with_run(load_recipe(options.recipe, options.overrides), options.run)
        train_recipe(recipe, resume=options.resume, restart_schedule=options.restart_schedule)
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def train_recipe(recipe: Recipe, *, resume: str = "auto", restart_schedule: bool = False) -> Path:
    """Train, or say that the run is finished; all ranks call it.

    Args:
        resume: "auto" (newest checkpoint that verifies, if any), "never" (refuses a run that has steps), or a
            checkpoint folder.
        restart_schedule: take weights and optimizer from that folder, but begin this recipe's plan at step 1.

    Returns:
        RUN/model, or RUN/adapter.

    Raises:
        SftError: see the exit codes of DESIGN.
    """
    if restart_schedule and resume in ("auto", "never"):
        remedy = "name the checkpoint: --resume PATH --restart-schedule"
        raise UserInputError(
            Problem(what="nothing to restart from", where="--restart-schedule", remedy=remedy)
        )
    owner = open_run(recipe, purpose="training") if dist.rank() == 0 else nullcontext(recipe.run_folder)
    with owner as run:
        if recipe.result_folder.is_dir():
            log.info("%s is finished; its weights are in %s", run, recipe.result_folder)
            return recipe.result_folder
        started = time.perf_counter()
        with StopRequest() as stop:
            _train(recipe, run, resume, stop, restart=restart_schedule)
        if dist.rank() == 0:
            record_seconds(run, "train", time.perf_counter() - started)
        return recipe.result_folder


def _train(recipe: Recipe, run: Path, resume: str, stop: StopRequest, *, restart: bool) -> None:
    ds_config = read_ds_config(deepspeed_file(recipe))
    check_engine(ds_config)
    start = _checkpoint_to_resume(run, resume)
    tokenizer, store = prepare(recipe)
    schedule = make_schedule(recipe, store, world=dist.world_size(), cost=measure_recipe(recipe).coefficients)
    if dist.rank() == 0:
        write_json(run / "plan.json", describe_plan(recipe, store, schedule))
    init_process_group()
    model = _load_model(recipe)
    if recipe.train.activation_checkpointing == "full":
        checkpoint_activations(model.causal_lm, stage=zero_stage(ds_config))
    stage = zero_stage(ds_config)
    resized = start is not None and read_state(start).world_size != dist.world_size() and stage > 0
    engine = Engine(model, recipe, ds_config, loads_universal=resized)
    first = _resume(engine, start, schedule, restart=restart)
    run_steps(recipe, engine, schedule, store, first=first, stop=stop)
    export_weights(engine, tokenizer, recipe)
    engine.close()


def _load_model(recipe: Recipe) -> LossModel:
    if recipe.task == "matching" and recipe.matching.mode == "encoder":
        return load_encoder_for_training(recipe)
    if recipe.classifies:
        return load_classifier_for_training(recipe, num_labels=NUM_CLASSES)
    return load_for_training(recipe)


def _checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint folder to go on from, or None to start anew.

    Raises:
        UserInputError: `never` on a run that has steps, or a folder that is no whole checkpoint.
    """
    if resume == "auto":
        return newest_usable(run)
    if resume == "never":
        if any((run / "checkpoints").glob("step-*")):
            remedy = "resume it (--resume auto), or choose another name or --run DIR"
            raise UserInputError(Problem(what="this run has checkpoints", where=str(run), remedy=remedy))
        return None
    reason = why_not_usable(Path(resume))
    if reason:
        raise UserInputError(
            Problem(what=f"can't resume: {reason}", where=resume, remedy="try --resume auto")
        )
    return Path(resume)


def _resume(engine: Engine, checkpoint: Path | None, schedule: Schedule, *, restart: bool) -> int:
    """Load a checkpoint; returns the number of steps done."""
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    if not restart:
        check_resumable(
            checkpoint, state, plan_fingerprint=schedule.fingerprint, plan_settings=plan_settings(schedule)
        )
    with for_this_world(checkpoint, state, stage=engine.stage) as folder:
        engine.load(folder)
    if restart:
        log.info("starting this plan with the weights and optimizer of %s", checkpoint)
        return 0
    log.info("resuming after step %d from %s", state.step, checkpoint)
    return state.step


if __name__ == "__main__":
    sys.exit(main())
