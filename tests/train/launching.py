"""Writing recipes and starting runs as a user does; used by several test files."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import warm
import yaml
from safetensors.torch import load_file
from warm import BIN

from sftcore.fsio import read_jsonl

ROOT = Path(__file__).parent.parent.parent
CELL_RUNNER = str(ROOT / "tests" / "train" / "run_cells.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def write_recipe(recipe: dict, name: str, **changes) -> Path:
    merged = recipe | {"name": name}
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return warm.run(list(command), env=ENVIRONMENT)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launcher(ranks: int) -> list[str]:
    """The deepspeed launcher on a free port, so that two test runs on one machine don't meet."""
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", free_port()]


def start_ranks(count: int, script: str, *arguments: str, port: str = "") -> list[warm.Process]:
    """Start the ranks of a job as Slurm does: each with its number and where to meet in its environment."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
    return [
        warm.Process(
            [sys.executable, script, *arguments],
            ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def run_cells(paths: list[Path], *, ranks: int, script: str = CELL_RUNNER) -> str:
    """Train the recipes one after another in one start of all ranks; their logs. Fails with their ends."""
    port = free_port()
    processes = start_ranks(ranks, script, *map(str, paths), port=port)
    codes = wait_for_all(processes)
    said = ["".join(process.output()) for process in processes]
    assert not any(codes), (codes, [text[-3000:] for text in said])
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "shared memory is left behind"
    return "".join(said)


def wait_for_all(processes: list[warm.Process], seconds: float = 500) -> list[int | None]:
    """Their exit codes; when one has failed the others have 30 s more."""
    deadline = time.monotonic() + seconds
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            deadline = min(deadline, time.monotonic() + 30)
        if time.monotonic() > deadline:
            for process in processes:
                process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    return codes


def result_file(name: str) -> Path:
    folder = Path("runs") / name
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return adapter if adapter.exists() else folder / "model" / "model.safetensors"


def weights(name: str) -> dict:
    return load_file(result_file(name))


def weights_hash(name: str) -> str:
    return hashlib.sha256(result_file(name).read_bytes()).hexdigest()


def steps(name: str) -> list[dict]:
    return read_jsonl(Path("runs") / name / "metrics.jsonl")


def wait_for(happens, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None or not seconds, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_steps(name: str, count: int = 3):
    metrics = Path("runs") / name / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= count
