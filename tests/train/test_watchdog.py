"""The watchdog: a rank that is killed or stuck ends the job, with its number, in bounded time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT, start_ranks, write_recipe
from warm import Process

from sftcore.train import watchdog as module
from sftcore.train.watchdog import Watchdog

WORKER = str(ROOT / "launcher" / "worker.py")
LONG = {"train": {"epochs": 200}, "checkpoint": {"save_every_steps": 100_000}}


def wait_for_steps(name: str, count: int, ranks: list[Process]) -> None:
    metrics = Path("runs") / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert all(r.poll() is None for r in ranks) and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "victim"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_rank_that_is_gone_ends_the_others(tiny_recipe, how, victim):
    path = write_recipe(tiny_recipe, "gone", **LONG)
    ranks = start_ranks(2, WORKER, str(path))
    wait_for_steps("gone", 3, ranks)
    ranks[victim].send_signal(how)
    gone_at = time.monotonic()
    said = ranks[1 - victim].communicate(timeout=90)[1]
    assert time.monotonic() - gone_at < 65
    assert ranks[1 - victim].returncode == 69 and "Traceback" not in said, said[-2000:]
    known = "another rank ended" if how == signal.SIGKILL else f"rank {victim} gave no sign of life"
    assert known in said, said[-2000:]
    ranks[victim].send_signal(signal.SIGKILL)  # the stopped one; the other is gone
    ranks[victim].communicate()


def test_the_time_allowed_follows_the_steps_unless_it_is_given():
    watchdog = Watchdog()
    assert watchdog.hang_seconds == module.MIN_HANG_SECONDS
    for seconds in (1.0, 100.0, 100.0):
        watchdog.step_done(seconds)
    assert watchdog.hang_seconds == 1000.0
    assert Watchdog(7.0).hang_seconds == 7.0


def test_a_hang_ends_the_process_with_its_stacks_and_suspension_does_not(tmp_path):
    script = (
        "import sys, time\n"
        "from sftcore.train import watchdog\n"
        "watchdog.BEAT_SECONDS = 0.1\n"
        "with watchdog.Watchdog(0.5) as dog:\n"
        "    time.sleep(1)\n"  # the first step is not timed
        "    dog.step_done(0.1)\n"
        "    with dog.suspended():\n"
        "        time.sleep(1)\n"
        "    print('still here', flush=True)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == "still here\n"
    assert "rank 0: no step has ended for 0 s" in done.stderr or "no step has ended for 1 s" in done.stderr
    assert 'File "<string>"' in done.stderr, "the stack of the main thread"
