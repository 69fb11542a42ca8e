"""From `--on debug|node|slurm` and its options to processes or jobs.

In: options of the command line. Out: ranks on this machine, or jobs in a queue.
Invariant: an option that the chosen way in can't honour is refused by name; nothing is started before all
options are checked.
Trade-off: one set of options for three ways in, so that a line changes by one word; their help says which
way each is for.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.errors import EXIT_DONE, Problem, UserInputError, error_of_code
from sftcore.launcher.hosts import check_hosts, read_hostfile
from sftcore.launcher.node import node_command, train_on_node
from sftcore.launcher.slurm import Job, Resources, recipe_jobs, submit_recipe, train_job
from sftcore.model.weight_files import check_weight_files
from sftcore.runs.claim import open_run, with_run

log = logging.getLogger("sftcore.ways")
RANKS_WAYS = ("debug", "node", "slurm")  # of a command that ranks or shares can do
STUDY_WAYS = ("here", "slurm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Where a run goes.

    Args:
        on: debug | node | slurm (a study: here | slurm); see `machines_of`.
        gpus_per_node: ranks per machine, each with a GPU; None: not said.
        ranks_per_node: ranks per machine, on CPUs; None: not said.
        options: of sbatch.
    """

    on: str
    nodes: int = 1
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    hostfile: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_gpus(self) -> bool:
        """Whether GPUs were asked for."""
        return bool(self.gpus_per_node)

    @property
    def num_ranks_per_node(self) -> int:
        """Ranks per machine; on this one as many as it has GPUs, if nothing was said."""
        said = self.gpus_per_node or self.ranks_per_node
        return said if said else num_gpus() if self.on == "node" else 1

    def require_ranks(self) -> int:
        """Ranks per machine.

        Raises:
            UserInputError: nothing was said, and this machine has no GPU.
        """
        if self.num_ranks_per_node == 0:
            remedy = "--ranks-per-node N for ranks on CPUs"
            raise UserInputError(Problem(what="this machine has no GPU", where="--on node", remedy=remedy))
        return self.num_ranks_per_node

    def resources(self) -> Resources:
        """What a job asks Slurm for."""
        return Resources(
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node or 0,
            ranks_per_node=self.ranks_per_node or 1,
            options=self.options,
        )


def num_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return int(torch.cuda.device_count())


def machines_of(on: str, *, ways: Sequence[str] = RANKS_WAYS, **said: Any) -> Machines:
    """Where a command goes; the one builder of `Machines`.

    Args:
        ways: those that the command has.
        said: the other fields of `Machines`.

    Raises:
        UserInputError: another way, or options that it can't honour: all of them, by name.
    """
    if on not in ways:
        raise UserInputError(Problem(what="no such way in", where="--on", got=on, allowed=", ".join(ways)))
    machines = Machines(on=on, **said)
    refused = {
        "--nodes": machines.nodes > 1 and on != "slurm",
        "--hostfile": machines.hostfile is not None and on != "node",
        "--gpus-per-node": bool(machines.gpus_per_node) and on == "debug",
        "--ranks-per-node": machines.ranks_per_node is not None and on == "debug",
        "--cpus-per-rank, --partition, --time, --account, --sbatch": bool(machines.options) and on != "slurm",
    }
    problems = [Problem(what=f"not with --on {on}", where=name) for name, bad in refused.items() if bad]
    if machines.gpus_per_node and machines.ranks_per_node:
        problems.append(Problem(what="not together with --gpus-per-node", where="--ranks-per-node"))
    if on == "slurm" and machines.gpus_per_node is None and machines.ranks_per_node is None:
        remedy = "--gpus-per-node N, or --ranks-per-node N for ranks on CPUs"
        problems.append(Problem(what="how many ranks per machine?", where="--on slurm", remedy=remedy))
    if problems:
        raise UserInputError(*problems)
    return machines


def train_elsewhere(recipe: Recipe, machines: Machines, more: Sequence[str], *, dry_run: bool) -> int:
    """Train on this machine's ranks or submit the job; returns the exit code.

    Args:
        more: further arguments of worker.py.
        dry_run: only print the line or the script.
    """
    recipe = with_run(recipe, str(recipe.run_folder))
    if not dry_run and _is_done(recipe):
        return EXIT_DONE
    if machines.on == "slurm":
        return _train_on_slurm(recipe, machines, more, dry_run=dry_run)
    hosts = read_hostfile(machines.hostfile) if machines.hostfile else {}
    num_ranks, total = _count_ranks(machines, hosts)
    arguments = [str(recipe.run_folder / "recipe.yaml"), "--run", str(recipe.run_folder), *more]
    command = node_command(
        arguments, num_ranks=num_ranks, hostfile=machines.hostfile, has_gpus=machines.ranks_per_node is None
    )
    if dry_run:
        print(" ".join(command))
        return EXIT_DONE
    if hosts:
        check_hosts(hosts, recipe.run_folder)
    return train_on_node(recipe, command, num_ranks=total, first_host=next(iter(hosts), None))


def train_by_ranks(recipe: Recipe, machines: Machines) -> None:
    """Train in processes of their own, whose exit code comes back as its error.

    Raises:
        SftError: as the ranks ended.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # what the probe's model took; does nothing on CPUs
    code = train_elsewhere(recipe, machines, [], dry_run=False)
    if code:
        what = f"{machines.require_ranks()} ranks ended with {code}; see {recipe.run_folder / 'logs'}"
        raise error_of_code(code, what)


def _is_done(recipe: Recipe) -> bool:
    """Claim the run folder, or tell why it can't be had, before anything starts; whether it is finished."""
    with open_run(recipe, purpose="training") as run:
        if recipe.result_folder.is_dir():
            check_weight_files(recipe.result_folder)
            log.info("%s is finished; its weights are in %s", run, recipe.result_folder)
        return recipe.result_folder.is_dir()


def _count_ranks(machines: Machines, hosts: Mapping[str, int]) -> tuple[int, int]:
    """(ranks per machine, ranks over all machines)."""
    if not hosts:
        count = machines.require_ranks()
        return count, count
    said = machines.gpus_per_node or machines.ranks_per_node or min(hosts.values())
    return said, said * len(hosts)


def _train_on_slurm(recipe: Recipe, machines: Machines, more: Sequence[str], *, dry_run: bool) -> int:
    job = train_job(recipe, machines.resources(), more)
    print(scripts_of([job]) if dry_run else submit_recipe(recipe, [job]))
    return EXIT_DONE


def submit_whole(recipe: Recipe, machines: Machines, *, num_shards: int, dry_run: bool) -> str:
    """Submit every stage of a recipe, each after the one before; says what was submitted."""
    recipe = with_run(recipe, str(recipe.run_folder))
    jobs = recipe_jobs(recipe, machines.resources(), num_shards=num_shards)
    return scripts_of(jobs) if dry_run else submit_recipe(recipe, jobs)


def scripts_of(jobs: Sequence[Job]) -> str:
    """The batch scripts of jobs, one after another."""
    return "\n".join(f"# {job.name}.sbatch\n{job.script()}" for job in jobs)
