"""`probe` and `evaluate` by several processes: `--on node` on this machine, `--on slurm` as an array of jobs.

In: a command, a recipe, the machines. Out: the files that one process would write.
Invariant: shares are whole batches that the items alone decide, so the number of processes changes no byte
(at the same OMP_NUM_THREADS on CPUs); what was done before a stop is found again.
Trade-off: each process loads the model by itself (seconds for 8B from a warm disk) instead of sharing it, so
that processes need no word with each other and a lost one costs only its share.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.errors import (
    EXIT_ENVIRONMENT,
    EXIT_STOPPED,
    EXIT_USER_INPUT,
    error_of_code,
)
from sftcore.fsio import tail_of
from sftcore.launcher.slurm import shared_stage, submit_recipe
from sftcore.launcher.ways_in import Machines, scripts_of
from sftcore.runs.claim import open_run, with_run
from sftcore.train.stopping import WITH_INTERRUPT, handling

log = logging.getLogger("sftcore.shares")
POLL_SECONDS = 0.2


def run_shares(
    command: str, recipe: Recipe, machines: Machines, *, more: Sequence[str] = (), dry_run: bool = False
) -> bool:
    """Run a command's shares; returns whether they are done, so that they can be merged here.

    Args:
        more: further arguments of the command.
        dry_run: only print the lines or scripts.

    Raises:
        SftError: a process failed, with its exit code; the others were stopped.
    """
    recipe = with_run(recipe, str(recipe.run_folder))
    run = recipe.run_folder
    arguments = [command, str(run / "recipe.yaml"), "--run", str(run), *more]
    if machines.on == "slurm":
        count = machines.nodes * machines.require_ranks()
        jobs = shared_stage(run, command, machines.resources(), arguments, num_shards=count)
        print(scripts_of(jobs) if dry_run else submit_recipe(recipe, jobs))
        return False
    count = machines.require_ranks()
    lines = [[*arguments, "--shard", f"{number}/{count}"] for number in range(count)]
    if dry_run:
        print("\n".join(" ".join(["sftcore", *line]) for line in lines))
        return False
    with open_run(recipe, purpose=command):
        pass  # writes RUN/recipe.yaml, or refuses another one's folder
    _run_processes(command, lines, run / "logs", has_gpus=machines.ranks_per_node is None)
    return True


def _run_processes(command: str, lines: Sequence[Sequence[str]], logs: Path, *, has_gpus: bool) -> None:
    """Run all lines at once and wait; process i sees GPU i, or a share of the cores."""
    logs.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // len(lines)))
    ended: list[int | None] = []
    processes, files = [], [logs / f"{command}-{number}.log" for number in range(len(lines))]
    with handling(WITH_INTERRUPT, _stop_raises):
        try:
            for number, line in enumerate(lines):
                environment = {"OMP_NUM_THREADS": threads, **os.environ}
                if has_gpus:
                    environment["CUDA_VISIBLE_DEVICES"] = _gpu(number)
                start = [sys.executable, "-m", "sftcore.launcher.cli", *line]
                with open(files[number], "ab") as output:
                    processes.append(subprocess.Popen(start, stdout=output, stderr=output, env=environment))
            log.info("%s in %s; their output: %s", command, counted(len(lines), "process"), logs)
            while any(process.poll() is None for process in processes):
                if any(ended := [process.poll() for process in processes]):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            for process in processes:
                process.terminate()
            codes = [process.wait() for process in processes]
    ended = ended if any(ended) else [*codes]  # not the code of one that was stopped because another failed
    if any(ended):
        number, code = next((i, code) for i, code in enumerate(ended) if code)
        again = "" if code in (EXIT_USER_INPUT, EXIT_ENVIRONMENT) else "; start again to go on"
        what = f"process {number} of {len(lines)} ended with exit code {code}{again}"
        raise error_of_code(code, f"{what}\n{tail_of(files[number])}")


def _gpu(number: int) -> str:
    """The number-th of the GPUs that this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[number] if visible else str(number)


def _stop_raises(number: int, frame: FrameType | None) -> None:
    """Handle a stop signal by SystemExit(75), which runs through every `finally`."""
    raise SystemExit(EXIT_STOPPED)
