"""Writing recipes and starting runs as a user does; used by several test files."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file

from sftcore.fsio import read_jsonl

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
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
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


def launcher(ranks: int) -> list[str]:
    """The deepspeed launcher on a free port, so that two test runs on one machine don't meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port)]


def run_cells(paths: list[Path], *, ranks: int) -> subprocess.CompletedProcess[str]:
    """Train the recipes one after another in one launch; fails with the end of its log."""
    start = [sys.executable] if ranks == 1 else launcher(ranks)
    done = run(*start, CELL_RUNNER, *map(str, paths))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{start[-1]}_*")), "shared memory is left behind"
    return done


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
