"""SIGKILL at random moments, saves included: whatever was cut, the resumed run ends with the same bytes.

SFTCORE_KILL_ROUNDS sets the number of kills (20 by default; 200 for acceptance).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from launching import BIN, ENVIRONMENT, run, steps, weights_hash, write_recipe
from warm import Process

ROUNDS = int(os.environ.get("SFTCORE_KILL_ROUNDS", "20"))
LONGEST_LIFE_SECONDS = 2.0  # after the first step of a start; most of it is spent saving


def live_and_die(recipe: Path, random_: random.Random) -> int | None:
    """Start, wait for a step of this start, kill after a random while; the exit code if it finished first."""
    process = Process([str(BIN / "sftcore"), "train", str(recipe)], ENVIRONMENT)
    metrics = Path("runs") / recipe.stem / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        time.sleep(0.01)
    time.sleep(random_.uniform(0, LONGEST_LIFE_SECONDS))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    code = process.wait()
    return None if code == -signal.SIGKILL else code


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_the_same_weights(tiny_recipe):
    changes = {
        "model": {"dtype": "bfloat16"},
        "train": {"epochs": 40},
        "checkpoint": {"save_every_steps": 1, "keep": 2},
    }
    whole, cut = (write_recipe(tiny_recipe, name, **changes) for name in ("whole", "cut"))
    assert run(str(BIN / "sftcore"), "train", str(whole)).returncode == 0
    random_ = random.Random(7)
    kills = 0
    while kills < ROUNDS:
        code = live_and_die(cut, random_)
        assert code in (None, 0)
        kills += code is None
        if code == 0:  # it finished: once more from the start
            check_same()
            shutil.rmtree("runs/cut")
        print(f"{kills} kills of {ROUNDS}", flush=True)
    done = run(str(BIN / "sftcore"), "train", str(cut))
    assert done.returncode == 0, done.stderr[-3000:]
    check_same()


def check_same() -> None:
    assert weights_hash("cut") == weights_hash("whole")
    assert [s["step"] for s in steps("cut")] == list(range(1, 161))
    assert [s["loss"] for s in steps("cut")] == [s["loss"] for s in steps("whole")]
    left = [*Path("runs/cut").rglob("*.tmp"), *Path("runs/cut").rglob(".*.tmp")]
    assert not left, "what a kill left is gone by the end"
    kept = Path("runs/cut/checkpoints").iterdir()
    assert all((folder / "COMMITTED").is_file() for folder in kept)
