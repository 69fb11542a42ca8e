"""Ranks as a launcher starts them: their arguments, who they are, what they leave.

In: worker.py's command line; SLURM_* variables. Out: RANK and its kin; RUN/run.pids, RUN/logs/rank-N.log and
rank-N.exit.
Invariant: a rank's exit code is in RUN/logs before the process ends; a rank without one was killed, so what
the ranks agreed on is known whatever became of the launcher between.
Trade-off: pids are listed under a file lock (1 ms each); only those of rank 0's machine, since a signal to
one rank stops all.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import psutil

from sftcore.errors import (
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_RANK_LOST,
    EXIT_STOPPED,
    EXIT_USER_INPUT,
)

PIDS, LOGS = "run.pids", "logs"
FIRST_PORT, NUM_PORTS = 20000, 10000  # below the ports that Linux hands out by itself (32768 and up)
GRAVITY = (EXIT_USER_INPUT, EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_RANK_LOST, EXIT_STOPPED, EXIT_DONE)
WORKERS = ("worker.py", "sftcore.launcher.worker")


def worker_parser() -> argparse.ArgumentParser:
    """Arguments of launcher/worker.py."""
    parser = argparse.ArgumentParser(prog="worker.py", description="Train a recipe as one of several ranks.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides")
    parser.add_argument("--run", default=None, metavar="DIR")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH")
    parser.add_argument("--restart-schedule", action="store_true")
    parser.add_argument("--max-steps", type=int, default=None, metavar="N")
    parser.add_argument(
        "--rank-logs", action="store_true", help="output of ranks but 0, and exit codes, to RUN/logs"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help="set by the launcher")
    return parser


def slurm_rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that srun started; else nothing.

    Rank 0 is on the step's first node. The port follows from the job's number, so that jobs that share a
    node don't meet. What another launcher has set stays.

    >>> slurm_rank_variables({"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3",
    ...     "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]"})
    {'RANK': '3', 'LOCAL_RANK': '1', 'WORLD_SIZE': '4', 'MASTER_ADDR': 'gpu07', 'MASTER_PORT': '20041'}
    """
    if "RANK" in environment or "SLURM_STEP_NODELIST" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS),
    }


def first_host(nodelist: str) -> str:
    """The first name of a Slurm node list, which may hold ranges.

    >>> [first_host(text) for text in ("n1", "gpu[07-09,12],cpu1", "r[2,4]n[01-02]-ib", "a,b[1-2]")]
    ['n1', 'gpu07', 'r2n01-ib', 'a']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def agreed_code(codes: Mapping[int, int], num_ranks: int, *, launcher_code: int = 0) -> int:
    """The exit code of a run from its ranks' codes: the gravest; a rank that left none was lost.

    Args:
        launcher_code: counts where no rank left a code, as none could start (a package is missing), unless
            they were killed (128 and more; deepspeed: below 0).

    >>> [agreed_code({0: 75, 1: 75}, 2), agreed_code({0: 69}, 2), agreed_code({0: 69, 1: 2}, 2)]
    [75, 69, 2]
    >>> [agreed_code({}, 2, launcher_code=code) for code in (1, 3, 137, 0)]
    [1, 3, 69, 69]
    """
    if not codes and 0 < launcher_code < 128:
        return launcher_code
    found = set(codes.values()) | ({EXIT_RANK_LOST} if len(codes) < num_ranks else set())
    return next((code for code in GRAVITY if code in found), EXIT_FAILED)


def read_codes(run: Path) -> dict[int, int]:
    """{rank: exit code} of the ranks that left one."""
    files = (run / LOGS).glob("rank-*.exit")
    texts = {
        int(file.stem.removeprefix("rank-")): file.read_bytes().decode("ascii", "replace").strip()
        for file in files
        if file.is_file()
    }
    return {rank: int(text) for rank, text in texts.items() if text.isdecimal()}


def forget_codes(run: Path) -> None:
    """Take away what earlier ranks left; for the launcher, before it starts new ones."""
    for file in (run / LOGS).glob("rank-*.exit"):
        file.unlink()


def write_code(run: Path, rank: int, code: int) -> None:
    """Leave a rank's exit code in RUN/logs."""
    (run / LOGS).mkdir(parents=True, exist_ok=True)
    (run / LOGS / f"rank-{rank}.exit").write_text(f"{code}\n")


def redirect_output(run: Path, rank: int) -> None:
    """Send this process's stdout and stderr to RUN/logs/rank-N.log, at the level of file descriptors."""
    (run / LOGS).mkdir(parents=True, exist_ok=True)
    log = os.open(run / LOGS / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)


@contextmanager
def listed_pid(run: Path) -> Iterator[None]:
    """Name this process in RUN/run.pids (one pid a line) while the block runs."""
    _edit_pids(run, add={os.getpid()})
    try:
        yield
    finally:
        _edit_pids(run, remove={os.getpid()})


def listed_pids(run: Path) -> list[int]:
    """Pids of RUN/run.pids: workers of rank 0's machine, which may be another; some may have been killed."""
    path = run / PIDS
    words = path.read_bytes().decode("ascii", "replace").split() if path.is_file() else []
    return [int(word) for word in words if word.isdecimal()]


def living_workers(run: Path) -> list[int]:
    """Pids of RUN/run.pids that are worker processes of this machine now."""
    return [pid for pid in listed_pids(run) if _is_worker(pid)]


def _edit_pids(run: Path, *, add: Set[int] = frozenset(), remove: Set[int] = frozenset()) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with open(run / PIDS, "a+", encoding="utf-8", errors="replace") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        alive = {pid for word in handle.read().split() if word.isdecimal() and _is_worker(pid := int(word))}
        handle.truncate(0)
        handle.write("".join(f"{pid}\n" for pid in sorted((alive | add) - remove)))


def _is_worker(pid: int) -> bool:
    try:
        words: Sequence[str] = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return any(word.endswith(WORKERS) for word in words)
