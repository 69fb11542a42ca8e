"""Where a command meets its terminal and its machine: streams that take any text, failures in one message.

In: a function that runs a command. Out: its exit code; what it could not foresee of the machine, explained.
Invariant: no text that is printed can end a command (an ASCII terminal, half characters in a file's name),
and none from data moves a terminal's cursor; a full disk, a limit on files, threads or memory, a folder that
is gone end with exit code 2 or 3 and no traceback.
Trade-off: errors of the operating system that nobody caught are known by their number, not by where they came
from; `SFTCORE_TRACEBACK=1` shows that, too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from sftcore.display import inert
from sftcore.errors import EXIT_DONE, MissingEnvironmentError, Problem, SftError, UserInputError

MAX_OPEN_FILES = 65536  # a limit to raise the process's own to, where the machine allows it
THREADS, THREADS_A_CORE, MAX_THREADS = 32, 3, 128  # a compiler's processes; OpenBLAS's, OpenMP's, rayon's
MIN_OPEN_FILES = 64  # a run of one process has about 30
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
YOURS = {  # errors of a path that was given
    errno.ENOENT: "",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "give a file",
    errno.EEXIST: "",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "links lead in a circle",
    errno.ENOTEMPTY: "",
    errno.ESPIPE: "give a file: a pipe or device can't be read twice",
    errno.EINVAL: "",
}
THE_MACHINES = {
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENFILE: "the machine has no more open files to give",
    errno.EAGAIN: "allow more processes and threads: ulimit -u 4096 (in a container: its pids limit)",
    errno.ENOMEM: "free memory, or allow more: ulimit -v unlimited",
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "your quota there is used up: free space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "you may not do that there: choose another place or fix its permissions",
    errno.EPERM: "you may not do that there: choose another place or fix its permissions",
    errno.EIO: "the disk or network storage fails: see the system's log",
    errno.ESTALE: "the network storage lost the file: start again",
    errno.ENODEV: "",
    errno.ENXIO: "",
}
SAID = {  # by libraries in errors of their own kinds
    "can't start new thread": errno.EAGAIN,
    "resource temporarily unavailable": errno.EAGAIN,
    "can't allocate memory": errno.ENOMEM,
    "not enough memory": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,
    "too many open files": errno.EMFILE,
    "no space left on device": errno.ENOSPC,
    "symlink loop": errno.ELOOP,
}


class _Inert(io.TextIOWrapper):
    """A terminal's stream that shows control characters as escapes, but for colours."""

    def write(self, text: str) -> int:
        """As of any text stream."""
        parts = COLOUR.split(text)
        super().write("".join(part if i % 2 else inert(part) for i, part in enumerate(parts)))
        return len(text)


def run_command(command: Callable[[], object]) -> None:
    """Run a command and end this process with its exit code."""
    prepare_streams()
    try:
        with explained():
            try:
                allow_open_files()
                check_current_folder()
                check_threads()
                command()
            finally:
                _flush()
    except SftError as error:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _forget_output()
        sys.exit(error.exit_code)
    sys.exit(EXIT_DONE)


def prepare_streams() -> None:
    """Let stdout and stderr take any text; a terminal gets no control characters of the data's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        encoding = sys.stdout.encoding
        sys.stdout = _Inert(
            sys.stdout.detach(), encoding=encoding, errors="backslashreplace", line_buffering=True
        )


def allow_open_files() -> None:
    """Raise this process's own limit on open files as far as the machine's allows.

    Raises:
        MissingEnvironmentError: that is too few for anything.
    """
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < MIN_OPEN_FILES:
            what = f"only {wanted} files may be open at a time"
            raise MissingEnvironmentError(Problem(what=what, remedy=THE_MACHINES[errno.EMFILE]))


def check_current_folder() -> None:
    """Refuse to work in a folder that was deleted.

    Raises:
        MissingEnvironmentError: there is none.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise MissingEnvironmentError(
            Problem(what="the current folder is gone", remedy="cd to one that exists, and start again")
        ) from error


def check_threads() -> None:
    """Start as many threads as the libraries will, for a moment (1 ms on two cores): without them OpenBLAS
    sends an interrupt, and the tokenizers' library panics.

    Raises:
        RuntimeError: the machine refuses one.
    """
    num_threads = min(MAX_THREADS, THREADS + THREADS_A_CORE * (os.cpu_count() or 1))
    done, threads = threading.Event(), []
    try:
        for _ in range(num_threads):
            threads.append(threading.Thread(target=done.wait))
            threads[-1].start()
    finally:
        done.set()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what the operating system refuses into an `SftError`.

    Raises:
        UserInputError: of a path.
        MissingEnvironmentError: of a limit, a disk, a permission, a package.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError, ImportError, UnicodeEncodeError) as error:
        told = explain(error)
        if told is None:
            raise
        if os.environ.get("SFTCORE_TRACEBACK"):
            traceback.print_exc()
        raise told from error


def explain(error: BaseException) -> SftError | None:
    """What an error of the machine means for the user; None for one that is ours."""
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_os_error(error)
    if isinstance(error, MemoryError):
        return MissingEnvironmentError(Problem(what="out of memory", remedy=THE_MACHINES[errno.ENOMEM]))
    if isinstance(error, RecursionError):
        return UserInputError(Problem(what="something that was given is nested too deeply"))
    text = str(error)
    if numbers := [number for words, number in SAID.items() if words in text.lower()]:
        return _of_number(numbers[0], text)
    if isinstance(error, UnicodeEncodeError):
        return UserInputError(Problem(what=f"a name or text that is not UTF-8: {text}"))
    if isinstance(error, ImportError):
        remedy = "sftcore doctor names what is missing or broken"
        return MissingEnvironmentError(Problem(what=f"a package can't be imported: {text}", remedy=remedy))
    return None


def _explain_os_error(error: OSError) -> SftError | None:
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    return _of_number(error.errno or 0, (error.strerror or str(error)).lower(), where)


def _of_number(number: int, what: str, where: str = "") -> SftError | None:
    """What an error number of the operating system means; None for one that is not foreseen."""
    if number in YOURS:
        return UserInputError(Problem(what=what, where=where, remedy=YOURS[number]))
    if number in THE_MACHINES:
        return MissingEnvironmentError(Problem(what=what, where=where, remedy=THE_MACHINES[number]))
    return None


def _flush() -> None:
    """Write out what stands in stdout's buffer; a reader that has left (`| head`) is no failure."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_output()


def _forget_output() -> None:
    """Let the interpreter's own last flush succeed, whatever became of stdout."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
