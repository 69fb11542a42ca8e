"""Commands on odd machines: full disks, ASCII terminals, few files and threads, folders that are gone."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.launcher import terminal
from sftcore.launcher.job_commands import load
from sftcore.log import log, setup_logging

CLI = [sys.executable, "-m", "sftcore.launcher.cli"]
ROOT = Path(__file__).parent.parent.parent


def command(*arguments: str | bytes, before=None, **more) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | more.pop("environment", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.run([*CLI, *arguments], env=environment, preexec_fn=before, text=True, **streams)


def check_refused(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_a_full_disk_below_stdout_is_the_machines_fault():
    with open("/dev/full", "w") as full:
        done = command("schema", stdout=full)
    check_refused(done, 3, "no space left on device")


def test_a_deleted_current_folder_is_told(tmp_path):
    def leave() -> None:
        os.chdir(tmp_path / "gone")
        os.rmdir(tmp_path / "gone")

    (tmp_path / "gone").mkdir()
    check_refused(command("prepare", "r.yaml", before=leave), 3, "the current folder is gone")


@pytest.mark.parametrize("name", ["北京.yaml".encode(), b"\xff\xfe.yaml", b"\x1b[31m.yaml"])
def test_an_ascii_terminal_and_odd_arguments(tmp_path, name):
    ascii_only = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C"}
    done = command("prepare", name, cwd=tmp_path, environment=ascii_only)
    check_refused(done, 2, "no such recipe")
    assert done.stderr.isascii() and "\x1b" not in done.stderr


def test_too_few_open_files():
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

    check_refused(command("schema", before=few_files), 3, "only 20 files may be open")


def test_the_limit_on_open_files_is_raised_as_far_as_it_may_be(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    terminal.allow_open_files()
    assert limits == [(4096, 4096)]


def test_too_few_threads_are_noticed_before_libraries_need_them(monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MissingEnvironmentError, match="ulimit -u"), terminal.explained():
        terminal.check_threads()


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (OSError(errno.EMFILE, "Too many open files", "f"), MissingEnvironmentError, "ulimit -n"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), MissingEnvironmentError, "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "fork"), MissingEnvironmentError, "ulimit -u"),
        (OSError(errno.EROFS, "Read-only file system", "f"), MissingEnvironmentError, "read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "f" * 9000), UserInputError, "shorter"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"f"), UserInputError, "is a file"),
        (MemoryError(), MissingEnvironmentError, "free memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            MissingEnvironmentError,
            "memory",
        ),
        (RuntimeError("bind: code: -24, message: too many open files"), MissingEnvironmentError, "ulimit -n"),
        (RuntimeError("Symlink loop from 'x'"), UserInputError, "circle"),
        (RecursionError(), UserInputError, "nested too deeply"),
        (ImportError("libx.so: failed to map segment"), MissingEnvironmentError, "memory"),
        (ModuleNotFoundError("No module named 'x'"), MissingEnvironmentError, "sftcore doctor"),
        ("\udcff", UserInputError, "not UTF-8"),
    ],
)
def test_what_the_machine_refuses_is_told_with_its_remedy(error, kind, remedy):
    with pytest.raises(kind, match=remedy) as told, terminal.explained():
        if isinstance(error, str):
            error.encode()
        raise error
    assert len(str(told.value)) < 3000


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), terminal.explained():
        raise RuntimeError("a bug")


def test_a_terminal_gets_no_control_characters_but_colours():
    raw = io.BytesIO()
    stream = terminal._Inert(raw, encoding="ascii", errors="backslashreplace", write_through=True)
    print("a\x1b[2J\x07b\x1b[32;1mc\x1b[0m\u202ed 北\tx", file=stream)
    assert raw.getvalue() == b"a\\x1b[2J\\x07b\x1b[32;1mc\x1b[0m\\u202ed \\u5317\tx\n"


def test_logs_hold_no_passwords_and_no_control_characters(capsys):
    setup_logging()
    log.warning("%s failed \x1b[31m", "https://me:hunter2@host/?token=hunter2")
    said = capsys.readouterr().err
    assert said == "https://***@host/?token=*** failed \\x1b[31m\n"


def test_labels_of_bars_are_not_markup(monkeypatch):
    from rich.console import Console

    from sftcore import log as module

    written = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console", lambda **_: Console(file=written, force_terminal=True, width=80)
    )
    with module._bar("[red]x[/red] [/nothing]", 3) as advance:
        advance(3)
    assert "[red]x[/red] [/nothing]" in written.getvalue()


@pytest.mark.parametrize("folder", ["file", "file/x", "/dev/null", "circle", "x" * 5000])
def test_a_run_folder_that_can_be_none_is_refused_by_name(tiny_recipe, folder):
    Path("file").touch()
    Path("circle").symlink_to("circle")
    Path("r.yaml").write_text(yaml.safe_dump(tiny_recipe))
    with pytest.raises(UserInputError, match="can't be a run folder"):
        load(Path("r.yaml"), None, folder)
    assert Path("file").read_bytes() == b"" and not Path("runs").exists()
