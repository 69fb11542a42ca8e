"""What every rank does: a recipe -> a trained model.

In: a resolved recipe; the ranks as worker.py was started, or this process alone. Out: a finished run folder.
Invariant: everything that takes long on the CPU (selection, tokenising) is done before ranks wait for each
other; one rank does it, under a lock, and the others find it done.
Trade-off: every rank reads the recipe and plans for itself (milliseconds) instead of being sent a plan.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sftcore import dist
from sftcore.amounts import counted
from sftcore.batching.schedule import Schedule
from sftcore.config import Recipe
from sftcore.data.check import describe_store
from sftcore.data.store import TokenStore
from sftcore.errors import (
    Problem,
    StoppedOnRequest,
    UserInputError,
)
from sftcore.fsio import write_json
from sftcore.heap import is_out_of_memory
from sftcore.model.cost import measure_recipe
from sftcore.model.load import load_config
from sftcore.model.ours import checkpoint_activations
from sftcore.model.proof import prove_head_and_packs
from sftcore.model.weight_files import check_weight_files
from sftcore.objectives import load_objective, objective_of
from sftcore.planning.preflight import describe_plan
from sftcore.precision import dtype_of
from sftcore.recipe import deepspeed_file
from sftcore.runs.claim import open_run, record_seconds
from sftcore.runs.lease import Lease, Watch, launchers_above, take_over, write_lease
from sftcore.runs.settle import check_dtype, with_dtype
from sftcore.stages.prepare import prepare, prepare_valid
from sftcore.train.batches import PackSource
from sftcore.train.checkpoint import (
    agreed_checkpoint,
    checkpoints_of,
    for_this_world,
    newest_usable,
    only_tensors_unpickled,
    read_state,
    why_not_usable,
)
from sftcore.train.devices import device_here
from sftcore.train.ds_config import complete_ds_config, read_ds_config, zero_stage
from sftcore.train.engine import Engine, check_engine, init_process_group
from sftcore.train.export import export_weights
from sftcore.train.foreseen import check_layers
from sftcore.train.loop import Loop, LoopSettings
from sftcore.train.memory import explain_out_of_memory
from sftcore.train.metrics import MetricsWriter
from sftcore.train.observers import DebugOptions, observing
from sftcore.train.outcome import PackTooLarge
from sftcore.train.overfit import check_overfit, overfit_one_step
from sftcore.train.plan import make_schedule, plan_settings
from sftcore.train.resumable import check_resumable, why_no_checkpoint
from sftcore.train.stopping import SIGNALS, WITH_INTERRUPT, StopRequest, handling
from sftcore.train.tracking import check_tracker
from sftcore.train.validate import Validation
from sftcore.train.watchdog import Watchdog

log = logging.getLogger("sftcore.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """How to train; see `train_recipe`.

    Args:
        signals: that ask for a stop.
    """

    resume: str
    restart: bool
    debug: DebugOptions
    max_steps: int | None
    signals: Sequence[signal.Signals]


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise StoppedOnRequest("stopped on request before the first step; start again to go on")


def train_recipe(
    recipe: Recipe,
    *,
    resume: str = "auto",
    restart_schedule: bool = False,
    debug: DebugOptions | None = None,
    max_steps: int | None = None,
    is_launched: bool = False,
) -> Path:
    """Train, or say that the run is finished; all ranks call it.

    Args:
        resume: "auto" (newest checkpoint that verifies, if any), "never" (refuses a run that has steps), or a
            checkpoint folder.
        restart_schedule: take weights and optimizer from that folder, but begin this recipe's plan at step 1.
        debug: what to look at on the way.
        max_steps: of this start, after which it stops with a checkpoint.
        is_launched: as a rank by a launcher, which sees Ctrl-C too and hands it on in its own way.

    Returns:
        RUN/model, or RUN/adapter.

    Raises:
        EnoughSteps: there were `max_steps`, and there are more in the plan.
        SftError: see the exit codes of docs/commands.md.
    """
    if restart_schedule and resume in ("auto", "never"):
        remedy = "name the checkpoint: --resume PATH --restart-schedule"
        raise UserInputError(
            Problem(what="nothing to restart from", where="--restart-schedule", remedy=remedy)
        )
    lease = Lease.mine()
    if dist.rank() == 0:
        take_over(recipe.run_folder, lease)
    owner = open_run(recipe, purpose="training") if dist.rank() == 0 else nullcontext(recipe.run_folder)
    with owner as run, Watch(launchers_above()) as watch:
        if recipe.result_folder.is_dir():
            check_weight_files(recipe.result_folder)
            log.info("%s is finished; its weights are in %s", run, recipe.result_folder)
            return recipe.result_folder
        started = time.perf_counter()
        if dist.rank() == 0:
            write_lease(run, lease)
        watch.holder = lease.holder
        request = TrainRequest(
            resume=resume,
            restart=restart_schedule,
            debug=debug or DebugOptions(),
            max_steps=max_steps,
            signals=SIGNALS if is_launched else WITH_INTERRUPT,
        )
        with StopRequest(request.signals) as stop:
            _train(recipe, run, request, stop, watch)
        if dist.rank() == 0:
            record_seconds(run, "train", time.perf_counter() - started)
        return recipe.result_folder


def _train(recipe: Recipe, run: Path, request: TrainRequest, stop: StopRequest, watch: Watch) -> None:
    ds_config = read_ds_config(deepspeed_file(recipe))
    check_engine(ds_config, recipe.train.optimizer)
    check_tracker(recipe)
    for path in (recipe.model.path, recipe.train.init_adapter):
        if path is not None:
            check_weight_files(Path(path))
    objective_of(recipe).try_model(recipe, load_config(recipe.model))
    check_layers(recipe, ds_config)
    with handling(request.signals, _stop_at_once):  # ranks have not met: there is nothing to agree on
        start = _checkpoint_to_resume(run, request.resume)
        if start is not None:
            check_dtype(recipe, start)
        tokenizer, store = prepare(recipe)
        log.info("%s", describe_store(store))
        valid_store = prepare_valid(recipe, tokenizer) if recipe.data.valid else None
        cost = measure_recipe(recipe).coefficients
        schedule = make_schedule(recipe, store, world=dist.world_size(), cost=cost)
        if dist.rank() == 0:
            write_json(run / "plan.json", describe_plan(recipe, store, schedule, device_here()))
    init_process_group()
    recipe = with_dtype(recipe, dist.gather_objects(dtype_of(recipe.model))[0])
    watch.keep_lease(run, dist.gather_objects(watch.holder)[0])
    start = agreed_checkpoint(run, start) if request.resume == "auto" else start
    with Watchdog(recipe.train.hang_seconds) as watchdog:
        is_resized = start is not None and read_state(start).world_size != dist.world_size()
        if is_resized and recipe.train.optimizer == "adamw-8bit" and zero_stage(ds_config) > 0:
            raise UserInputError(_eight_bit_is_cut(start))
        engine = _make_engine(recipe, ds_config, is_resized=is_resized)
        first = _resume(engine, start, schedule, restart=request.restart)
        validation = None
        if valid_store:
            known = _evaluations_before(start, run) if first else 0
            validation = Validation(recipe, valid_store, tokenizer, steps_done=first, num_evaluations=known)
        with observing(request.debug, engine.objective, run) as observers:
            loop = Loop(
                engine=engine,
                source=_source_of(recipe, schedule, store),
                settings=LoopSettings(
                    folder=run,
                    train=recipe.train,
                    checkpoint=recipe.checkpoint,
                    dtype=dtype_of(recipe.model),
                    max_steps=request.max_steps,
                ),
                writer=MetricsWriter(recipe, steps_done=first, num_steps=schedule.num_steps),
                stop=stop,
                watchdog=watchdog,
                validation=validation,
                observers=observers,
            )
            try:
                loop.run_steps(first)
            except StoppedOnRequest:
                dist.barrier()  # no rank may take another's end for a failure
                raise
            except PackTooLarge as error:
                raise explain_out_of_memory(error, recipe, schedule) from error
        with watchdog.suspended():
            if validation and recipe.train.keep == "best":
                validation.promote_best(engine)
            else:
                export_weights(engine, tokenizer, recipe, folder=recipe.result_folder)
        engine.close()


def _source_of(recipe: Recipe, schedule: Schedule, store: TokenStore) -> PackSource:
    return PackSource(
        schedule=schedule, store=store, seed=recipe.training_seed, normalise=recipe.train.normalise
    )


def _evaluations_before(checkpoint: Path | None, run: Path) -> int:
    """How many rows of this run's valid.jsonl its checkpoint knows of; another run's are not here."""
    if checkpoint is None or checkpoint.resolve().parent.parent != run.resolve():
        return 0
    return read_state(checkpoint).num_evaluations


def _eight_bit_is_cut(checkpoint: Path | None) -> Problem:
    return Problem(
        what="8-bit optimizer state is quantised in blocks of each rank's share and can't be cut otherwise",
        where=str(checkpoint),
        got=counted(dist.world_size(), "rank"),
        remedy="resume at the number of ranks that it was saved with",
    )


def _make_engine(recipe: Recipe, ds_config: dict[str, Any], *, is_resized: bool = False) -> Engine:
    """The model, loaded, proven on packs, and wrapped; all ranks call it."""
    stage = zero_stage(ds_config)
    is_sharded = loads_sharded(recipe, ds_config)
    model = load_objective(recipe, sharded_by=complete_ds_config(ds_config, recipe) if is_sharded else None)
    if recipe.train.activation_checkpointing == "full":
        checkpoint_activations(model.causal_lm)
    engine = Engine(model, recipe, ds_config, loads_universal=is_resized and stage > 0)
    if is_sharded:
        with engine.gathering():
            prove_head_and_packs(engine.objective.causal_lm)
    return engine


def loads_sharded(recipe: Recipe, ds_config: dict[str, Any]) -> bool:
    """Whether weights are sharded as they are read: under ZeRO-3, unless something needs whole weights."""
    adapter = recipe.adapter
    needs_whole = adapter.kind == "qlora" or adapter.dora or recipe.model.add_tokens
    return zero_stage(ds_config) == 3 and objective_of(recipe).is_shardable and not needs_whole


def overfit_recipe(recipe: Recipe) -> str:
    """Repeat one step of a recipe's plan until it is learned, in this process; writes no run.

    Raises:
        TrainingFailed: it was not learned.
        UserInputError: the recipe's loss can't reach 0.
    """
    check_overfit(recipe.train)
    ds_config = read_ds_config(deepspeed_file(recipe))
    check_engine(ds_config, recipe.train.optimizer)
    _, store = prepare(recipe)
    schedule = make_schedule(recipe, store, world=1, cost=measure_recipe(recipe).coefficients)
    init_process_group()
    engine = _make_engine(recipe, ds_config)
    return overfit_one_step(recipe.train, engine, _source_of(recipe, schedule, store))


def _checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint folder to go on from, or None to start from the beginning.

    Raises:
        UserInputError: `never` on a run that has steps, or a folder that is no whole checkpoint.
    """
    if resume == "auto":
        return newest_usable(run)
    if resume == "never":
        if checkpoints_of(run):
            remedy = "resume it (--resume auto), or choose another name or --run DIR"
            raise UserInputError(Problem(what="this run has checkpoints", where=str(run), remedy=remedy))
        return None
    reason = why_no_checkpoint(Path(resume), run) or why_not_usable(Path(resume))
    if reason:
        raise UserInputError(
            Problem(what=f"can't resume: {reason}", where=resume, remedy="try --resume auto")
        )
    return Path(resume)


@contextmanager
def _unfit_explained(checkpoint: Path) -> Iterator[None]:
    """torch and DeepSpeed report weights of another model, and a file that is none, in errors of many kinds.

    Raises:
        UserInputError: in place of them.
    """
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, RuntimeError) and (dist.is_about_a_lost_rank(error) or is_out_of_memory(error)):
            raise
        raise UserInputError(
            Problem(
                what="this checkpoint doesn't fit the model, or its files are none of torch's",
                where=str(checkpoint),
                got=" ".join(str(error).split())[:200],
                remedy="resume from a checkpoint of the same model and deepspeed configuration",
            )
        ) from error


def _resume(engine: Engine, checkpoint: Path | None, schedule: Schedule, *, restart: bool) -> int:
    """Load a checkpoint; returns the number of steps done."""
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    if not restart:
        check_resumable(checkpoint, state, schedule=schedule, plan_settings=plan_settings(schedule))
    with (
        only_tensors_unpickled(checkpoint),
        _unfit_explained(checkpoint),
        for_this_world(checkpoint, state, stage=engine.stage) as folder,
    ):
        engine.load(folder)
    if restart:
        log.info("starting this plan with the weights and optimizer of %s", checkpoint)
        return 0
    log.info("resuming after step %d from %s", state.step, checkpoint)
    return state.step
