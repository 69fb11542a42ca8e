"""Options of commands, in groups; and how a command takes a whole group.

In: a function with parameters that are groups. Out: one with an option for each field, as Typer reads it.
Invariant: an option has one name and one meaning in all commands; a group's fields stand in the help where
the group stands in the function's parameters.
Trade-off: Typer knows no groups, so `spread` builds the signature that it reads (1 ms for all commands); a
command has 6 parameters at most, and train's 20 options are still one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from sftcore.launcher.ways_in import Machines

MAX_RANKS, MAX_SHARDS = 100_000, 10_000  # larger numbers are slips of the hand
RecipePath = Annotated[
    Path, typer.Argument(help="recipe (YAML; see recipes/), or a run's folder", metavar="RECIPE_OR_RUN")
]
On = Annotated[
    str, typer.Option("--on", metavar="debug|node|slurm", help="this process, this machine, a cluster")
]
Nodes = Annotated[int, typer.Option(min=1, max=MAX_RANKS, help="slurm: machines")]
GpusPerNode = Annotated[
    int | None, typer.Option(min=1, max=MAX_RANKS, help="ranks per machine, each with a GPU")
]
RanksPerNode = Annotated[int | None, typer.Option(min=1, max=MAX_RANKS, help="ranks per machine, on CPUs")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the lines or scripts, and stop")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What differs from the recipe's file."""

    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="override a recipe key; may be repeated"),
    ] = None
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder, if not runs/NAME")] = (
        None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Processes of a machine."""

    gpus_per_node: GpusPerNode = None
    ranks_per_node: RanksPerNode = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """What a job asks of the cluster, apart from machines."""

    cpus_per_rank: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_RANKS, help="slurm: cores of a rank; 4 with a GPU, else the site's default"
        ),
    ] = None
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="key[=value]", help="slurm: any option of sbatch"),
    ] = None
    partition: Annotated[str | None, typer.Option(help="slurm: partition")] = None
    time: Annotated[str | None, typer.Option(help="slurm: time limit; the run goes on behind it")] = None
    account: Annotated[str | None, typer.Option(help="slurm: account")] = None

    def options(self) -> dict[str, str]:
        """Options of sbatch by name; `--sbatch key=value` and `--sbatch key` (of a flag) take any."""
        cpus = str(self.cpus_per_rank) if self.cpus_per_rank else None
        named = {
            "cpus-per-task": cpus,
            "partition": self.partition,
            "time": self.time,
            "account": self.account,
        }
        pairs = [option.removeprefix("--").partition("=")[::2] for option in self.sbatch or []]
        return {key: value for key, value in named.items() if value} | dict(pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a command goes."""

    on: On = "debug"
    nodes: Nodes = 1
    ranks: Ranks = Ranks()
    slurm: Slurm = Slurm()

    def machines(self, **more: Any) -> Machines:
        """As `machines_of` checks it.

        Raises:
            UserInputError: options that the way in can't honour.
        """
        from sftcore.launcher.ways_in import machines_of

        return machines_of(
            self.on,
            nodes=self.nodes,
            gpus_per_node=self.ranks.gpus_per_node,
            ranks_per_node=self.ranks.ranks_per_node,
            options=self.slurm.options(),
            **more,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """A part of a command's work."""

    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="do share i (0 to N-1) of the batches only; see --merge")
    ] = None
    merge: Annotated[
        bool, typer.Option("--merge", help="only put the shards together; all have to be done")
    ] = False

    @property
    def needs_all(self) -> bool:
        """Whether other options need all shards."""
        return self.merge


@dataclass(frozen=True, slots=True, kw_only=True)
class PartShares(Shares):
    """A part of `prepare`'s work."""

    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="make share i (0 to N-1) of the parts only; see --merge")
    ] = None
    merge: Annotated[
        bool, typer.Option("--merge", help="only write the manifest; all shards have to be done")
    ] = False
    check: Annotated[
        bool, typer.Option("--check", help="report on the data: RUN/check.txt and RUN/check.png")
    ] = False

    @property
    def needs_all(self) -> bool:
        """Whether other options need all shards."""
        return self.merge or self.check


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """What a plan is made for."""

    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="plan for a100, h100, h200, l40s, ...; if not this machine"),
    ] = None
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, metavar="GB", help="of each GPU, if not its data sheet's"),
    ] = None
    gpu_tflops: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="dense bfloat16 TFLOP/s, if not its data sheet's")
    ] = None
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="share of that rate that training reaches")] = (
        0.4
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlace:
    """Where a run is trained."""

    on: On = "debug"
    nodes: Nodes = 1
    ranks: Ranks = Ranks()
    hostfile: Annotated[
        Path | None, typer.Option(help="node: machines, `name slots=8` a line, reached by ssh")
    ] = None
    slurm: Slurm = Slurm()

    def machines(self) -> Machines:
        """As `machines_of` checks it."""
        place = Place(on=self.on, nodes=self.nodes, ranks=self.ranks, slurm=self.slurm)
        return place.machines(hostfile=self.hostfile)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resuming:
    """From where training goes on."""

    resume: Annotated[str, typer.Option(metavar="auto|never|PATH", help="checkpoint to go on from")] = "auto"
    restart_schedule: Annotated[
        bool, typer.Option("--restart-schedule", help="with --resume PATH: begin this recipe's plan anew")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Debugging:
    """What to look at on the way, in one process; all ranks take `max_steps`."""

    debug_anomaly: Annotated[
        bool,
        typer.Option("--debug-anomaly", help="name the first tensor that is not finite; norms per layer"),
    ] = False
    max_steps: Annotated[int | None, typer.Option(min=1, help="stop after N steps, with a checkpoint")] = None
    overfit_one_step: Annotated[
        bool, typer.Option("--overfit-one-step", help="repeat step 1 until its loss is below 0.01; no run")
    ] = False
    profile: Annotated[bool, typer.Option("--profile", help="trace three steps; RUN/debug")] = False


def spread(command: Callable[..., object]) -> Callable[..., object]:
    """The command with an option for each field of its groups (dataclasses, which may hold others)."""
    hints = get_type_hints(command, include_extras=True)
    own = signature(command).parameters
    groups = {name: hints[name] for name in own if is_dataclass(hints[name])}
    parameters: list[Parameter] = []
    for name, parameter in own.items():
        found = _options_of(groups[name]) if name in groups else [(name, hints[name], parameter.default)]
        parameters += [
            Parameter(option, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for option, kind, default in found
        ]

    @wraps(command)
    def with_groups(**values: Any) -> object:
        filled = {name: _filled(group, values) for name, group in groups.items()}
        return command(**filled, **{name: values[name] for name in own if name not in groups})

    with_groups.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_groups.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return with_groups


def _options_of(group: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, default) of each option, those of inner groups in their place."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from _options_of(kind)
        else:
            yield field.name, kind, Parameter.empty if field.default is MISSING else field.default


def _filled(group: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(group, include_extras=True)
    found = {
        field.name: _filled(hints[field.name], values)
        if is_dataclass(hints[field.name])
        else values[field.name]
        for field in fields(group)
    }
    return group(**found)
