"""The machines of a host file, as DeepSpeed's launcher reaches them: by ssh, all at once.

In: a host file (`name slots=8` a line). Out: its machines; what they lack; a signal to workers there.
Invariant: nothing is started before every machine answers and has the run folder and the environment under
their paths here: one that does not would leave the others waiting for half an hour.
Trade-off: a login by ssh to each machine ahead of DeepSpeed's own, at once: 0.3 s on a local network.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError

log = logging.getLogger("sftcore.hosts")
CONNECT_SECONDS, ANSWER_SECONDS = 10, 60
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
MAX_LOGINS = 64  # at once


def read_hostfile(path: Path) -> dict[str, int]:
    """{host: slots} of a DeepSpeed host file.

    Raises:
        UserInputError: no such file, no host in it, one twice, or a line that is not `name slots=N`.
    """
    if not path.is_file():
        raise UserInputError(Problem(what="no such host file", where=f"--hostfile {path}"))
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 and "slots=" in words[1] else ""
        if not slots.isdigit() or words[0] in hosts:
            what = "a host that was named before" if words[0] in hosts else "not a host"
            raise UserInputError(
                Problem(what=what, where=f"{path}:{number}", got=line, allowed="name slots=8")
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise UserInputError(
            Problem(what="no host in it", where=f"--hostfile {path}", allowed="name slots=8")
        )
    return hosts


def check_hosts(hosts: Iterable[str], run: Path) -> None:
    """See that each machine can be reached and has this run folder and this Python.

    Raises:
        MissingEnvironmentError: naming every machine that does not, and why.
    """
    absent = [name for name in ("ssh", "pdsh") if shutil.which(name) is None]
    if absent:
        remedy = "install it (Debian: openssh-client, pdsh), or go through Slurm: --on slurm"
        what = f"no {' and no '.join(absent)} command here"
        raise MissingEnvironmentError(Problem(what=what, where="--hostfile", remedy=remedy))
    needed = [run, Path(sys.executable), Path(__file__).parent / "worker.py"]
    with ThreadPoolExecutor(MAX_LOGINS) as logins:
        found = logins.map(lambda host: _lacks(host, needed), hosts)
        if problems := [problem for problem in found if problem]:
            raise MissingEnvironmentError(*problems)


def _lacks(host: str, needed: Sequence[Path]) -> Problem | None:
    files = " ".join(shlex.quote(str(path)) for path in needed)
    done = _on_host(host, f'for f in {files}; do test -e "$f" || echo "$f"; done')
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        remedy = f"`ssh {host} true` must work here without a password; or take it out of the host file"
        return Problem(what=f"{host} can't be reached: {why}", where="--hostfile", remedy=remedy)
    said = done.stdout.splitlines()  # a login may print more
    if absent := [str(path) for path in needed if str(path) in said]:
        remedy = "all machines must share the run folder and the environment, under the same paths"
        return Problem(what=f"{host} lacks {', '.join(absent)}", where="--hostfile", remedy=remedy)
    return None


def signal_workers(host: str, pids: Sequence[int], number: signal.Signals) -> bool:
    """Send a signal to those of a machine's processes that are workers; returns whether it got there."""
    each = " ".join(map(str, pids))
    line = f"for p in {each}; do grep -q worker.py /proc/$p/cmdline && kill -{number.value} $p; done; true"
    done = _on_host(host, line)
    if done.returncode:
        log.warning("%s can't be asked to stop, trying again: %s", host, done.stderr.strip())
    return done.returncode == 0


def _on_host(host: str, line: str) -> subprocess.CompletedProcess[str]:
    command = [*SSH, host, line]
    how = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": ANSWER_SECONDS}
    try:
        return subprocess.run(command, **how)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {ANSWER_SECONDS} s")
