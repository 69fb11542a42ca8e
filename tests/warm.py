"""Commands in forks of one process that has their imports: a start costs 20 ms instead of 6 s of a core.

In: a command as for `subprocess`, run in the current folder. Out: what `subprocess` gives.
Invariant: a fork begins where a new interpreter would after its imports: no thread, no process group of
torch, the caller's folder, environment and files; it ends as an interpreter does. A command that this can't
promise for (another program, another number of threads, `python -c`) starts cold.
Trade-off: the forks share one seed of `hash()` and what imports alone have set. What a start itself does is
left to the tests that start cold: the `deepspeed` launcher, Slurm, and those that measure memory.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

BIN = Path(sys.executable).parent
READ_AT_START = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "HF_HOME", "HF_HUB_OFFLINE"),
    *("PYTHONPATH", "PYTHONHASHSEED", "LD_PRELOAD", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX"),
)
REQUEST_BYTES = 1 << 20


class Process:
    """A running command with its output in files; the part of `subprocess.Popen` that tests use."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.args, self.returncode = command, None
        self._files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        script, self._cold = _script(command, env), None
        if script is None:
            self._cold = subprocess.Popen(command, env=env, stdout=self._files[0], stderr=self._files[1])
            self.pid = self._cold.pid
            return
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(str(_server()[0]))
        request = {"script": script, "folder": os.getcwd(), "environment": env}
        files = [0, *(file.fileno() for file in self._files)]
        socket.send_fds(self._connection, [json.dumps(request).encode()], files)
        self.pid = int(self._connection.recv(64))

    def poll(self) -> int | None:
        """The exit code, minus a signal's number, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""
        if self._cold:
            self.returncode = self._cold.wait(timeout)
        elif self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._connection.recv(64))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; what it has written to stdout and to stderr."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """What it has written so far."""
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        return texts[0], texts[1]


def run(command: list[str], *, env: dict[str, str], timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text."""
    process = Process(command, env)
    try:
        texts = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _script(command: list[str], env: dict[str, str]) -> list[str] | None:
    """[script, its arguments], or None for what starts cold."""
    python = command[0] == sys.executable and not command[1].startswith("-")
    if not python and command[0] != str(BIN / "sftcore"):
        return None
    own = _server()[1]
    if any(env.get(key) != own.get(key) for key in READ_AT_START):
        return None
    return command[1:] if python else command


@cache
def _server() -> tuple[Path, dict[str, str]]:
    """Start the process that forks, which ends with this one: its socket and its environment."""
    folder = Path(tempfile.mkdtemp(prefix="sftcore-warm-"))
    path = folder / "socket"
    process = subprocess.Popen([sys.executable, __file__, str(path)], stdin=subprocess.PIPE)
    atexit.register(process.kill)
    while not path.exists():
        assert process.poll() is None, "the process that forks did not start"
        time.sleep(0.01)
    return path, dict(os.environ)


def _serve(path: Path) -> list[str]:
    """Answer requests for ever; returns, in a fork for each, the script to run with its arguments."""
    waiting = path.with_suffix(".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(waiting))
    listener.listen(64)
    waiting.rename(path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _fork_and_tell(connection)
        connection.close()


def _fork_and_tell(connection: socket.socket) -> list[str]:
    """In a fork: run the command in a fork of this one, tell its number and later its exit code, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, files, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _become(json.loads(text), files)
    connection.send(str(pid).encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.send(str(code).encode())
    os._exit(0)


def _become(request: dict, files: list[int]) -> list[str]:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["script"]


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    import gc

    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import sftcore.stages.train  # noqa: F401

    _end_with_parent()
    gc.freeze()
    script, *arguments = _serve(Path(sys.argv[1]))
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")
