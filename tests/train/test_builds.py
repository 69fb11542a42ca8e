"""Locks of DeepSpeed's builds: a killed builder's goes, a living one's is waited for."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sftcore.train import builds, engine

BUILDER = """
import os, sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("holds", flush=True)
time.sleep(float(sys.argv[2]))
baton.release()
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_a").mkdir()
    return tmp_path


def builder_of(lock, seconds):
    process = subprocess.Popen([sys.executable, "-c", BUILDER, lock, str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"holds\n"
    return process


def made_seconds_ago(lock, seconds):
    made = time.time() - seconds
    os.utime(lock, (made, made))


def test_the_lock_of_a_killed_build_is_removed(root, caplog):
    lock = root / "deepspeed_a" / "lock"
    builder = builder_of(lock, 600)
    builder.kill()
    builder.wait()
    made_seconds_ago(lock, builds.LOCAL_SECONDS - 1)
    builds.await_other_builds()
    assert not lock.exists() and "deepspeed_a: a build was killed here" in caplog.text


def test_a_running_build_is_waited_for_and_named(root, caplog):
    lock = root / "deepspeed_a" / "lock"
    builder = builder_of(lock, 2)
    made_seconds_ago(lock, 10_000)
    with caplog.at_level("INFO"):
        builds.await_other_builds()
    assert builder.wait() == 0  # whose own release found its lock
    assert not lock.exists() and f"delete {lock} if none does" in caplog.text
    assert "killed" not in caplog.text


def test_what_a_builder_elsewhere_writes_shows_that_it_lives(root):
    """Another container's process can't be seen, but its files can."""
    lock = root / "deepspeed_a" / "lock"
    lock.touch()
    made_seconds_ago(lock, 10_000)
    compiled = root / "deepspeed_a" / "shm.o"
    compiled.touch()
    made_seconds_ago(compiled, builds.LOCAL_SECONDS - 1)
    started = compiled.stat().st_mtime
    builds.await_other_builds()
    assert not lock.exists() and time.time() - started > builds.LOCAL_SECONDS


def test_of_many_that_find_a_dead_lock_one_removes_it(root):
    lock = root / "deepspeed_a" / "lock"
    lock.touch()
    made_seconds_ago(lock, 10_000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: builds.await_other_builds(), range(8)))
    assert not lock.exists()


def test_on_a_shared_file_system_a_lock_may_be_another_machines(root, monkeypatch):
    monkeypatch.setattr(builds, "_is_shared", lambda path: True)
    lock = root / "deepspeed_a" / "lock"
    lock.touch()
    made_seconds_ago(lock, builds.SHARED_SECONDS - 1)
    started = lock.stat().st_mtime
    builds.await_other_builds()
    assert not lock.exists() and time.time() - started > builds.SHARED_SECONDS


def test_other_programs_locks_are_left_alone(root):
    theirs = root / "theirs" / "lock"
    theirs.parent.mkdir()
    theirs.touch()
    builds.await_other_builds()
    assert theirs.exists()


def test_a_library_is_found_by_its_file_without_a_linker(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("something was run"))
    assert not builds.finds_library("sftcore-test")
    (tmp_path / "libsftcore-test.so").touch()
    for name, value in (("LIBRARY_PATH", f"/nowhere:{tmp_path}"), ("LDFLAGS", f"-O1 -L{tmp_path}")):
        monkeypatch.setenv(name, value)
        assert builds.finds_library("sftcore-test"), name
        monkeypatch.delenv(name)
    assert not builds.finds_library("sftcore-test")


def test_a_plan_runs_no_linker_where_libaio_is_not(monkeypatch):
    asked = []
    monkeypatch.setattr(engine.AsyncIOBuilder, "is_compatible", lambda self, verbose: asked.append(1) or True)
    engine.has_async_io.cache_clear()
    monkeypatch.setattr(engine, "finds_library", lambda name: False)
    assert not engine.may_have_async_io() and not asked
    monkeypatch.setattr(engine, "finds_library", lambda name: True)
    assert engine.may_have_async_io() and engine.may_have_async_io() and len(asked) == 1
    engine.has_async_io.cache_clear()
