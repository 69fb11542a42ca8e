"""Commands that make jobs, and the options that several commands share.

In: arguments. Out: `probe`, `evaluate`, `submit` and `study`; the option types of cli.py.
Invariant: an option has one name and one meaning in all commands, and the values that its command takes: a
study's `--on` and `--run` are its own.
Trade-off: apart from cli.py only so that each file can be read at a sitting; cli.py lists all commands.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.attempts import begin_stage
from launcher.given import require_run
from launcher.precision import settle
from launcher.run_folder import with_run
from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.hub import require_hub
from sftcore.paths import folder_fault
from sftcore.recipe import load_recipe
from sftcore.run_recipe import RECIPE, check_beside_recipe, read_run_recipe

if TYPE_CHECKING:
    from launcher.ways_in import Machines

MAX_RANKS, MAX_SHARDS = 100_000, 10_000  # larger numbers are slips of the hand
RecipePath = Annotated[
    Path, typer.Argument(help="recipe (YAML; see recipes/), or a run's folder", metavar="RECIPE_OR_RUN")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="override a recipe key; may be repeated")
]
RunFolder = Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder, if not runs/NAME")]
On = Annotated[
    str, typer.Option("--on", metavar="debug|node|slurm", help="this process, this machine, a cluster")
]
Nodes = Annotated[int, typer.Option(min=1, max=MAX_RANKS, help="slurm: machines")]
GpusPerNode = Annotated[
    int | None, typer.Option(min=1, max=MAX_RANKS, help="ranks per machine, each with a GPU")
]
RanksPerNode = Annotated[int | None, typer.Option(min=1, max=MAX_RANKS, help="ranks per machine, on CPUs")]
CpusPerRank = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_RANKS, help="slurm: cores of a rank; 4 with a GPU, else the site's default"),
]
Sbatch = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="key[=value]", help="slurm: any option of sbatch"),
]
Shard = Annotated[
    str | None, typer.Option(metavar="i/N", help="do share i (0 to N-1) of the batches only; see --merge")
]
Merge = Annotated[bool, typer.Option("--merge", help="only put the shards together; all have to be done")]
Partition = Annotated[str | None, typer.Option(help="slurm: partition")]
Time = Annotated[str | None, typer.Option(help="slurm: time limit; the run goes on after it")]
Account = Annotated[str | None, typer.Option(help="slurm: account")]


def probe(
    recipe: RecipePath,
    on: On = "debug",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the lines or scripts, and stop")] = False,
    shard: Shard = None,
    merge: Merge = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Facts -> recall -> memory levels of the base model; over several processes with --on."""
    from launcher.ways_in import machines_of

    machines = machines_of(
        on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        options=sbatch_options(sbatch, cpus_per_rank, partition, time, account),
    )
    loaded = load(recipe, set_, run, machines=machines)
    from launcher.shares import run_shares, share_of
    from launcher.stages import describe_levels, probe_share
    from launcher.stages import probe as probe_stage

    begin_stage(loaded.run_folder, "probe")
    if shard is not None:
        print(probe_share(loaded, share_of(shard, is_alone=not merge)))
    elif on == "debug" or run_shares("probe", loaded, machines, dry_run=dry_run):
        print(describe_levels(probe_stage(loaded, merge_only=merge or on != "debug")))


def evaluate(
    recipe: RecipePath,
    model: Annotated[Path | None, typer.Option(help="evaluate this folder instead of base and tuned")] = None,
    on: On = "debug",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the lines or scripts, and stop")] = False,
    shard: Shard = None,
    merge: Merge = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Answers of the base and the trained model to the held-out items, scored; --on: by several processes."""
    from launcher.ways_in import machines_of

    machines = machines_of(
        on,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        options=sbatch_options(sbatch, cpus_per_rank, partition, time, account),
    )
    loaded = load(recipe, set_, run, machines=machines)
    from launcher.evaluating import evaluate as evaluate_stage
    from launcher.evaluating import evaluate_share
    from launcher.shares import run_shares, share_of

    begin_stage(loaded.run_folder, "evaluate")
    more = [] if model is None else ["--model", str(model.resolve())]
    if shard is not None:
        print(evaluate_share(loaded, share_of(shard, is_alone=not merge), model=model))
    elif on == "debug" or run_shares("evaluate", loaded, machines, more=more, dry_run=dry_run):
        found = evaluate_stage(loaded, model=model, merge_only=merge or on != "debug")
        for name, scores in found.items():
            print(f"{name}: {scores['correct']} of {scores['n']} right, {scores['accuracy']:.1%}")


def submit(
    recipe: RecipePath,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    shards: Annotated[
        int, typer.Option(min=1, max=MAX_SHARDS, help="jobs that share probe, data and evaluation")
    ] = 1,
    cpus_per_rank: CpusPerRank = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, and stop")] = False,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Submit a whole run to Slurm: probe, prepare, train, evaluate, report, each after the one before."""
    from launcher.ways_in import machines_of, submit_whole

    machines = machines_of(
        "slurm",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        options=sbatch_options(sbatch, cpus_per_rank, partition, time, account),
    )
    print(
        submit_whole(load(recipe, set_, run, machines=machines), machines, num_shards=shards, dry_run=dry_run)
    )


def study(
    study: Annotated[Path, typer.Argument(help="base recipe, grid, draws (YAML)", metavar="STUDY")],
    on: Annotated[
        str, typer.Option(metavar="here|slurm", help="one after another here, or an array of jobs")
    ] = "here",
    status: Annotated[bool, typer.Option("--status", help="print a line a run, and do nothing")] = False,
    number: Annotated[int | None, typer.Option(min=0, help="make this run only (0-based)")] = None,
    conclude: Annotated[
        bool, typer.Option("--conclude", help="make no run; write study.json and the study's page")
    ] = False,
    throttle: Annotated[int, typer.Option(min=1, help="slurm: jobs that run at a time")] = 4,
    gpu: Annotated[bool, typer.Option("--gpu", help="as --gpus-per-node 1")] = False,
    gpus_per_node: GpusPerNode = None,
    ranks_per_node: RanksPerNode = None,
    cpus_per_rank: CpusPerRank = None,
    sbatch: Sbatch = None,
    partition: Partition = None,
    time: Time = None,
    account: Account = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and name the runs, and stop")] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="if not runs/NAME")] = None,
) -> None:
    """Run a grid of recipes, each on one machine; finished runs are skipped, failed ones don't stop it."""
    from launcher.study import conclude as conclude_study
    from launcher.study import load_study, run_here, run_number, status_table, submit_study
    from launcher.ways_in import STUDY_WAYS, machines_of

    machines = machines_of(
        on,
        ways=STUDY_WAYS,
        gpus_per_node=gpus_per_node or (None if ranks_per_node else int(gpu)),
        ranks_per_node=ranks_per_node,
        options=sbatch_options(sbatch, cpus_per_rank, partition, time, account),
    )
    given = {"--gpus-per-node": gpus_per_node, "--ranks-per-node": ranks_per_node}
    ranks = [word for name, count in given.items() if count for word in (name, str(count))]
    loaded = load_study(study, run, machines=machines, rank_options=ranks)
    if dry_run:
        print("\n".join(item.name for item in loaded.runs))
        return
    if conclude:
        begin_stage(loaded.folder, "conclude")
        conclude_study(loaded)
        return
    if number is not None:
        sys.exit(run_number(loaded, number))
    if on == "slurm" and not status:
        print(submit_study(loaded, study, machines.resources(), throttle=throttle))
        return
    if not status:
        run_here(loaded)
    print(status_table(loaded))


def sbatch_options(
    options: list[str] | None,
    cpus_per_rank: int | None,
    partition: str | None,
    time: str | None,
    account: str | None,
) -> dict[str, str]:
    """Options of sbatch by name; `--sbatch key=value` and `--sbatch key` (of a flag) take any."""
    cpus = str(cpus_per_rank) if cpus_per_rank else None
    named = {"cpus-per-task": cpus, "partition": partition, "time": time, "account": account}
    pairs = [option.removeprefix("--").partition("=")[::2] for option in options or []]
    return {key: value for key, value in named.items() if value} | dict(pairs)


def load(
    path: Path,
    overrides: list[str] | None,
    run: str | None,
    *,
    machines: Machines | None = None,
    has_gpu: bool = False,
    resume: str = "auto",
) -> Recipe:
    """A recipe or a run folder's, with `--set` and `--run` applied, dtype and rate decided (see `settle`).

    Raises:
        UserInputError: what is wrong with the recipe, or with the run folder; no folder for the run.
        MissingEnvironmentError: it runs here, and its model is neither here nor to be had.
    """
    is_run = os.path.isdir(path)  # which no odd path makes raise
    if is_run:
        require_run(path)
        read_run_recipe(path)  # refuses other folders, and recipes that were damaged
    recipe = load_recipe(path / RECIPE if is_run else path, overrides)
    run = run or (str(path) if is_run else None)
    folder = Path(run) if run else recipe.run_folder
    if fault := folder_fault(folder):
        what, remedy = f"can't be a run folder: {fault}", "choose another: --run DIR"
        raise UserInputError(Problem(what=what, where=str(folder), remedy=remedy))
    recipe = with_run(recipe, run)
    if not is_run:
        check_beside_recipe(recipe.run_folder, [path])
    if machines is None or machines.on != "slurm":
        require_hub([recipe])
    return settle(recipe, machines, has_gpu=has_gpu, resume=resume)
