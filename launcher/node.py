"""`sftcore train --on node`: the ranks of one machine, or of a host file's, under DeepSpeed's launcher.

In: a recipe, the number of ranks. Out: a finished run folder, RUN/logs; the exit code that the ranks agreed
on.
Invariant: a stop signal goes to the ranks themselves, and they are waited for however long their last step
and save take.
Trade-off: DeepSpeed's launcher is kept, though a signal to it kills it alone and it reports 0 when killed
(0.19.8): its line is the one that people type, and host files work. What became of the ranks is read from
the ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from sftcore.config import Recipe
from sftcore.errors import EXIT_DONE, EXIT_STOPPED, MissingEnvironmentError, Problem, UserInputError
from sftcore.launcher.hosts import signal_workers
from sftcore.launcher.ranks import LOGS, agreed_code, forget_codes, listed_pids, living_workers, read_codes
from sftcore.train.stopping import WITH_INTERRUPT, handling

log = logging.getLogger("sftcore.node")
WORKER = Path(__file__).parent / "worker.py"
POLL_SECONDS = 0.2
Told = tuple[int, signal.Signals]  # a rank's pid and what it was sent


def node_command(
    worker_arguments: Sequence[str],
    *,
    num_ranks: int,
    hostfile: Path | None = None,
    has_gpus: bool = True,
) -> list[str]:
    """The line that starts the ranks, as a person would type it.

    Args:
        num_ranks: per machine.
        has_gpus: each rank has one, of those that CUDA_VISIBLE_DEVICES names, if it does.
        hostfile: DeepSpeed's (`name slots=8` a line); its machines are reached through ssh and pdsh.

    Raises:
        MissingEnvironmentError: DeepSpeed's launcher is not installed.
    """
    own = Path(sys.executable).parent / "deepspeed"
    deepspeed = str(own) if own.is_file() else shutil.which("deepspeed")
    if deepspeed is None:
        raise MissingEnvironmentError(
            Problem(what="no deepspeed command here", remedy="install it: pip install deepspeed")
        )
    hosts = ["--hostfile", str(hostfile), "--force_multi"] if hostfile else []  # one machine may be another
    return [
        deepspeed,
        *hosts,
        *(("--num_gpus", str(num_ranks)) if hostfile or not has_gpus else _gpu_choice(num_ranks)),
        *("--master_port", str(_free_port())),
        str(WORKER),
        *worker_arguments,
        "--rank-logs",
    ]


def _gpu_choice(num_ranks: int) -> tuple[str, str]:
    """DeepSpeed's option for so many GPUs; --num_gpus would forget CUDA_VISIBLE_DEVICES (a job's own GPUs).

    Raises:
        UserInputError: fewer are visible.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not all(number.isdigit() for number in visible):  # unset, or names of GPU instances
        return "--num_gpus", str(num_ranks)
    if len(visible) < num_ranks:
        got, allowed = f"{num_ranks} ranks", f"{len(visible)} GPUs: {','.join(visible)}"
        raise UserInputError(
            Problem(
                what="more ranks than visible GPUs", where="CUDA_VISIBLE_DEVICES", got=got, allowed=allowed
            )
        )
    return "--include", f"localhost:{','.join(visible[:num_ranks])}"


def train_on_node(
    recipe: Recipe, command: Sequence[str], *, num_ranks: int, first_host: str | None = None
) -> int:
    """Start the ranks, show rank 0's output, hand stop signals on; returns the agreed exit code.

    Args:
        command: of `node_command`.
        num_ranks: over all machines.
        first_host: the host file's first machine, where rank 0 is.
    """
    run = recipe.run_folder
    forget_codes(run)
    print(shlex.join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []  # stop signals, of which this process does not die
    told: set[Told] = set()
    with handling(WITH_INTERRUPT, lambda number, _: received.append(number)):
        while launcher.poll() is None or _session_lives(launcher.pid):
            if launcher.poll() is not None and not received:
                received.append(signal.SIGTERM)  # the launcher was killed, its ranks were not
            if received:
                told |= _tell(run, received, told, first_host)
            time.sleep(POLL_SECONDS)
    code = agreed_code(read_codes(run), num_ranks, launcher_code=launcher.returncode)
    if code not in (EXIT_DONE, EXIT_STOPPED):
        log.warning("the ranks ended with %s; their output: %s", read_codes(run), run / LOGS)
    return code


def _tell(run: Path, received: Sequence[int], told: set[Told], first_host: str | None) -> set[Told]:
    """Hand the stop on to ranks of rank 0's machine that were not sent it yet; returns (pid, signal) of each.

    A second Ctrl-C ends those at once; ranks of other machines notice that they are gone.
    """
    is_urgent = list(received).count(signal.SIGINT) > 1
    number = signal.SIGKILL if is_urgent else signal.SIGUSR1
    listed = listed_pids(run) if first_host else living_workers(run)
    new = {(pid, number) for pid in listed} - told
    if first_host:
        are_told = not new or signal_workers(first_host, [pid for pid, _ in new], number)
        return new if are_told else set()
    for pid, _ in new:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return new


def _session_lives(leader: int) -> bool:
    """Whether a process that the launcher started is left, under whatever parent."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == leader:
                return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
