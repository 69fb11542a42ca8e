"""Commands that make jobs, and the recipe that every command begins with.

In: arguments. Out: `probe`, `evaluate`, `submit` and `study`, which cli.py lists; `load`.
Invariant: options are checked before anything that takes long is imported; a study's `--on` and `--run` are
its own.
Trade-off: apart from cli.py only so that each file can be read at a sitting; cli.py lists all commands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftcore.config import Recipe
from sftcore.launcher.attempts import begin_stage
from sftcore.launcher.options import (
    MAX_SHARDS,
    Changes,
    DryRun,
    Nodes,
    Place,
    Ranks,
    RecipePath,
    Shares,
    Slurm,
)
from sftcore.runs.load import load_recipe
from sftcore.shares import share_of
from sftcore.stages.stage import STAGES, Stage

if TYPE_CHECKING:
    from sftcore.launcher.ways_in import Machines


def probe(
    recipe: RecipePath, place: Place, dry_run: DryRun = False, *, shares: Shares, changes: Changes
) -> None:
    """Facts -> recall -> memory levels of the base model; over several processes with --on."""
    machines = place.machines()
    loaded = load(recipe, changes.set_, changes.run, machines=machines)
    levels = run_shared(STAGES["probe"], loaded, shares, machines=machines, dry_run=dry_run)
    if levels is not None:
        from sftcore.stages.prepare import describe_levels

        print(describe_levels(levels))


def evaluate(
    recipe: RecipePath,
    model: Annotated[Path | None, typer.Option(help="evaluate this folder instead of base and tuned")] = None,
    *,
    place: Place,
    dry_run: DryRun = False,
    shares: Shares,
    changes: Changes,
) -> None:
    """Answers of the base and the trained model to the held-out items, scored; --on: by several processes."""
    machines = place.machines()
    loaded = load(recipe, changes.set_, changes.run, machines=machines)
    found = run_shared(STAGES["evaluate"], loaded, shares, machines=machines, dry_run=dry_run, model=model)
    for name, scores in (found or {}).items():
        print(f"{name}: {scores['correct']} of {scores['n']} right, {scores['accuracy']:.1%}")


def run_shared(
    stage: Stage,
    recipe: Recipe,
    shares: Shares,
    *,
    machines: Machines | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Any:
    """Do a stage that can be shared, or a share of it; returns the whole's result, None without one.

    Args:
        machines: whose processes do the shares; None or "debug": this process does the whole.
        options: of the stage.
    """
    from sftcore.launcher.shares import run_shares

    begin_stage(recipe.run_folder, stage.name)
    if shares.shard is not None:
        assert stage.share is not None
        print(stage.share(recipe, share_of(shares.shard, is_alone=not shares.needs_all), **options))
        return None
    is_here = machines is None or machines.on == "debug"
    if machines is not None and not is_here:
        said = {f"--{name}": str(value.resolve()) for name, value in options.items() if value is not None}
        more = [word for pair in said.items() for word in pair]
        if not run_shares(stage.name, recipe, machines, more=more, dry_run=dry_run):
            return None
    return stage.run(recipe, merge_only=shares.merge or not is_here, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """Where `sftcore submit` sends a run."""

    nodes: Nodes = 1
    ranks: Ranks = Ranks()
    shards: Annotated[
        int, typer.Option(min=1, max=MAX_SHARDS, help="jobs that share probe, data and evaluation")
    ] = 1
    slurm: Slurm = Slurm()


def submit(
    recipe: RecipePath,
    where: WholeRun,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the scripts, and stop")] = False,
    *,
    changes: Changes,
) -> None:
    """Submit a whole run to Slurm: probe, prepare, train, evaluate, report, each after the one before."""
    from sftcore.launcher.ways_in import submit_whole

    machines = Place(on="slurm", nodes=where.nodes, ranks=where.ranks, slurm=where.slurm).machines()
    loaded = load(recipe, changes.set_, changes.run, machines=machines)
    print(submit_whole(loaded, machines, num_shards=where.shards, dry_run=dry_run))


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPart:
    """What to do of a study, if not all of it."""

    status: Annotated[bool, typer.Option("--status", help="print a line a run, and do nothing")] = False
    number: Annotated[int | None, typer.Option(min=0, help="make this run only (0-based)")] = None
    conclude: Annotated[
        bool, typer.Option("--conclude", help="make no run; write study.json and the study's page")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlace:
    """Where the runs of a study go."""

    throttle: Annotated[int, typer.Option(min=1, help="slurm: jobs that run at a time")] = 4
    gpu: Annotated[bool, typer.Option("--gpu", help="as --gpus-per-node 1")] = False
    ranks: Ranks = Ranks()
    slurm: Slurm = Slurm()

    def machines(self, on: str) -> Machines:
        """As `machines_of` checks it."""
        from sftcore.launcher.ways_in import STUDY_WAYS, machines_of

        return machines_of(
            on,
            ways=STUDY_WAYS,
            gpus_per_node=self.ranks.gpus_per_node or (None if self.ranks.ranks_per_node else int(self.gpu)),
            ranks_per_node=self.ranks.ranks_per_node,
            options=self.slurm.options(),
        )

    def rank_options(self) -> list[str]:
        """The ranks that train each run, as options of `sftcore run`."""
        given = {
            "--gpus-per-node": self.ranks.gpus_per_node,
            "--ranks-per-node": self.ranks.ranks_per_node,
        }
        return [word for name, count in given.items() if count for word in (name, str(count))]


def study(
    study: Annotated[Path, typer.Argument(help="base recipe, grid, draws (YAML)", metavar="STUDY")],
    on: Annotated[
        str, typer.Option(metavar="here|slurm", help="one after another here, or an array of jobs")
    ] = "here",
    *,
    part: StudyPart,
    place: StudyPlace,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and name the runs, and stop")] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="if not runs/NAME")] = None,
) -> None:
    """Run a grid of recipes, each on one machine; finished runs are skipped, failed ones don't stop it."""
    from sftcore.launcher.study import conclude as conclude_study
    from sftcore.launcher.study import load_study, run_here, run_number, status_table, submit_study

    machines = place.machines(on)
    loaded = load_study(study, run, machines=machines, rank_options=place.rank_options())
    if dry_run:
        print("\n".join(item.name for item in loaded.runs))
        return
    if part.conclude:
        begin_stage(loaded.folder, "conclude")
        conclude_study(loaded)
        return
    if part.number is not None:
        sys.exit(run_number(loaded, part.number))
    if on == "slurm" and not part.status:
        print(submit_study(loaded, study, machines.resources(), throttle=place.throttle))
        return
    if not part.status:
        run_here(loaded)
    print(status_table(loaded))


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
    where = machines.on if machines else "debug"
    has_gpu = has_gpu or (machines is not None and machines.has_gpus)
    return load_recipe(path, overrides or (), run=run, on=where, has_gpu=has_gpu, resume=resume)


def stage_command(stage: Stage) -> Callable[..., object]:
    """The command of a stage that has none of its own making: it prints the result."""

    def alone(recipe: RecipePath, changes: Changes) -> None:
        loaded = load(recipe, changes.set_, changes.run)
        begin_stage(loaded.run_folder, stage.name)
        print(stage.run(loaded))

    def shared(
        recipe: RecipePath, place: Place, dry_run: DryRun = False, *, shares: Shares, changes: Changes
    ) -> None:
        machines = place.machines()
        loaded = load(recipe, changes.set_, changes.run, machines=machines)
        result = run_shared(stage, loaded, shares, machines=machines, dry_run=dry_run)
        if result is not None:
            print(result)

    return shared if stage.share else alone
