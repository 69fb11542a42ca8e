"""One writer a run: a later attempt of the same job takes over, and whoever was taken over from ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sftcore.runs.lease import Lease, read_lease, take_over, write_lease

HOLDER = """
import sys, time
from pathlib import Path
from sftcore.runs import lease
from sftcore.fsio import folder_lock
lease.LEASE_SECONDS = lease.WATCH_SECONDS = 0.1
run = Path(sys.argv[1])
with folder_lock(run, purpose="training"), lease.Watch([]) as watch:
    mine = lease.Lease(holder="first", job=sys.argv[2], attempt=0, place="the first")
    lease.write_lease(run, mine)
    watch.keep_lease(run, mine.holder)
    while not watch._is_confirmed:
        time.sleep(0.01)
    print("held", flush=True)
    time.sleep(60)
"""
ORPHAN = """
import signal, sys, time
import psutil
from sftcore.runs import lease
lease.WATCH_SECONDS = 0.1
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with lease.Watch([psutil.Process(int(sys.argv[1]))]):
    print("watching", flush=True)
    time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() in ("held\n", "watching\n")
    return process


def lease_of(job: str, attempt: int) -> Lease:
    return Lease(holder=f"{job}.{attempt}", job=job, attempt=attempt, place="a test")


def test_a_later_attempt_takes_over_and_the_earlier_one_ends(tmp_path):
    earlier = start(HOLDER, str(tmp_path), "7")
    take_over(tmp_path, lease_of("7", 1))
    _, said = earlier.communicate(timeout=30)
    assert earlier.returncode == 2 and read_lease(tmp_path).holder == "7.1", said


@pytest.mark.parametrize("other", [lease_of("8", 1), lease_of("7", 0), lease_of("", 1)])
def test_anybody_else_leaves_the_holder_alone(tmp_path, other):
    holder = start(HOLDER, str(tmp_path), "7")
    take_over(tmp_path, other)
    assert read_lease(tmp_path).holder == "first" and holder.poll() is None
    holder.kill()
    holder.communicate()


def test_an_unreadable_lease_is_none(tmp_path):
    assert read_lease(tmp_path) is None
    (tmp_path / "lease.json").write_text('{"holder": "x"')
    assert read_lease(tmp_path) is None
    write_lease(tmp_path, lease_of("1", 0))
    assert read_lease(tmp_path) == lease_of("1", 0)


def test_a_process_stops_when_its_launcher_is_gone(tmp_path):
    launcher = subprocess.Popen(["sleep", "60"])
    rank = start(ORPHAN, str(launcher.pid))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    rank.communicate(timeout=30)
    assert rank.returncode == 75 and not psutil.pid_exists(launcher.pid)
    assert not list(Path(tmp_path).iterdir())
