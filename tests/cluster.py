"""Simulated machines with a real Slurm, each with a network of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from warm import BIN

LAB = Path(__file__).parent / "slurmlab"


class Cluster:
    """Clients of a lab; commands run in the current folder, on the controller's machine or on `login`."""

    def __init__(self, lab: str, *, nodes: int = 2, login: str | None = None) -> None:
        self.environment = os.environ | {"NODES": str(nodes), "LAB": lab}
        self.login = [f"@{login}"] if login else []

    def script(self, name: str, *arguments: str, seconds: int = 240) -> subprocess.CompletedProcess[str]:
        command = [str(LAB / name), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=seconds)

    def command(self, line: str) -> list[str]:
        """What runs a shell line."""
        variables = f"export PATH={BIN}:$PATH OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu"
        return [str(LAB / "in.sh"), *self.login, "bash", "-c", f"cd {Path.cwd()} && {variables} && {line}"]

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(line), env=self.environment, capture_output=True, text=True, timeout=240
        )

    def train(self, path: Path, *options: str, environment: str = "") -> str:
        """Submit; returns the job's number."""
        done = self.shell(f"{environment} sftcore train {path} --on slurm {' '.join(options)}")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    def wait(self, job: str, seconds: int = 400) -> str:
        """Wait for the end; returns Slurm's words."""
        return self.script("wait.sh", job, str(seconds), seconds=seconds + 60).stdout

    def state(self, job: str) -> str:
        return self.shell(f"squeue --noheader --jobs {job} --format %T").stdout.strip()

    def restarts(self, job: str) -> int:
        shown = self.shell(f"scontrol show job {job}").stdout
        return int(shown.partition("Restarts=")[2].split()[0])


@contextmanager
def started_cluster(*, nodes: int = 2, login: str | None = None) -> Iterator[Cluster]:
    """Skips where it does not start (it needs root and Debian)."""
    folder = tempfile.mkdtemp(prefix="lab", dir="/tmp")  # munged wants folders that all may enter
    os.chmod(folder, 0o755)
    cluster = Cluster(folder, nodes=nodes, login=login)
    try:
        started = cluster.script("start.sh", seconds=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Slurm lab here: {error}")
    if started.returncode:
        pytest.skip(f"no Slurm lab here: {started.stderr[-300:]}")
    yield cluster
    cluster.script("stop.sh")
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(happens, seconds: float = 90) -> None:
    """Look again and again; the logs below the current folder tell what went wrong."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, logs()[-3000:]
        time.sleep(0.05)


def logs() -> str:
    return "\n".join(log.read_text() for log in Path.cwd().rglob("*.log"))
