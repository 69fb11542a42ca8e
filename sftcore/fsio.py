"""Files that are whole or absent: atomic writes, JSON lines, checksums, folder locks.

In: bytes, JSON values, paths. Out: files that a crash or a full disk can't leave half-written under their
real name.
Invariant: the final name appears only by `os.replace` of a flushed temporary sibling.
Trade-off: each atomic write costs one fsync (about 1 ms on an SSD, 10 ms on network storage), so per-step
metrics are appended line by line instead: their readers leave a torn last line out, the next append fixes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import gzip
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.leftovers import held_folder, hold, remove_leftovers
from sftcore.paths import file_fault

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without them
TAIL_LINES = 6  # of a log, in a message
LOOK_SECONDS = 0.5  # a look holds a lock for microseconds, on network storage for milliseconds
DAMAGED = "the file is damaged: put a good copy there, or move it away to have it made again"
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)


@contextlib.contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" and "read-only" into a message that names the folder and the remedy.

    Raises:
        MissingEnvironmentError: on ENOSPC, EDQUOT, EROFS, EACCES or EIO.
        UserInputError: a folder is where a file should be, or the other way round.
    """
    try:
        yield
    except OSError as error:
        if error.errno in IN_THE_WAY:
            remedy = "something else has this name: move it away, or choose another folder"
            where = str(error.filename2 or error.filename or path)
            what = f"can't write: {error.strerror}"
            raise UserInputError(Problem(what=what, where=where, remedy=remedy)) from error
        remedies = {
            errno.ENOSPC: "free space there, or point --run / the cache to another disk",
            errno.EDQUOT: "your quota there is used up: free space, or use another disk",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "you may not write there: choose another folder or fix its permissions",
            errno.EIO: "the disk fails: look at the system's log, or choose another disk",
        }
        if error.errno not in remedies:
            raise
        raise MissingEnvironmentError(
            Problem(what=f"can't write: {error.strerror}", where=str(path), remedy=remedies[error.errno])
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path`; on success it is flushed and renamed to `path`, else removed.

    Args:
        path: final name; its folder is created.
        mode: "w" (UTF-8, newline kept; lone surrogates, from odd file names, become JSON's escapes) or "wb".

    Raises:
        UserInputError: a folder, pipe or device (a rename would replace /dev/null itself).
    """
    if (fault := file_fault(path)) and not fault.startswith("no such file"):
        raise UserInputError(Problem(what=f"can't be written to: {fault}", where=str(path)))
    temporary = _temporary_of(path)
    encoding, newline, errors = (None, None, None) if "b" in mode else ("utf-8", "\n", "backslashreplace")
    with disk_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=encoding, newline=newline, errors=errors) as handle:
                hold(handle.fileno())
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it becomes `path`, else it goes.

    Args:
        keep_existing: a `path` that exists by then stays (for caches, whose content its name decides);
            otherwise it is replaced.
    """
    temporary = _temporary_of(path)
    remove_leftovers(path.parent, f".{glob.escape(path.name)}.????????.tmp")
    with disk_errors_explained(path):
        try:
            temporary.mkdir(parents=True)
            with held_folder(temporary):
                yield temporary
                sync_folder(temporary)
                if path.exists() and not keep_existing:
                    shutil.rmtree(path)
                _rename_folder(temporary, path, keep_existing=keep_existing)
            sync_entry(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # as leftovers.TEMPORARY


def _rename_folder(temporary: Path, path: Path, *, keep_existing: bool) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        if not keep_existing or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync_folder(folder: Path) -> None:
    """fsync every file below `folder`, then the folder itself, so that a rename can't outrun the data."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    sync_entry(folder)


def sync_entry(folder: Path) -> None:
    """fsync one directory's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    with atomic_file(path) as handle:
        json.dump(value, handle, ensure_ascii=False, indent=1, allow_nan=False)
        handle.write("\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; returns the number of lines."""
    count = 0
    with atomic_file(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def append_jsonl(path: Path, row: dict[str, Any], *, sync: bool = False) -> None:
    """Append one JSON object as one line in a single write, after a whole line.

    Args:
        sync: it is on the disk when this returns.
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors_explained(path), open(path, "a+b") as handle:
        _mend_last_line(handle)
        handle.write(line.encode())
        handle.flush()
        if sync:
            os.fsync(handle.fileno())


def _mend_last_line(handle: IO[bytes]) -> None:
    """End the last line of JSON lines, or take it away if a crash has cut it."""
    size = handle.seek(0, os.SEEK_END)
    if not size:
        return
    handle.seek(size - 1)
    if handle.read(1) == b"\n":
        return
    handle.seek(0)
    head, newline, last = handle.read().rpartition(b"\n")
    if _is_object(last):
        handle.write(b"\n")
    else:
        handle.truncate(len(head) + len(newline))


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def sync_file(path: Path) -> None:
    """fsync a file that was appended to; one that is not there needs none."""
    with disk_errors_explained(path), contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
        os.fsync(handle.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON file that sftcore wrote.

    Raises:
        UserInputError: the file is missing, can't be read or is not JSON.
    """
    content = _read_bytes(path)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserInputError(Problem(what=f"not valid JSON: {error}", where=str(path))) from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file that sftcore wrote and that holds an object with these keys.

    Raises:
        UserInputError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        got = type(value).__name__
        raise UserInputError(Problem(what="must be a mapping", where=str(path), got=got, remedy=DAMAGED))
    if missing := [key for key in keys if key not in value]:
        what = f"lacks {', '.join(missing)}"
        raise UserInputError(Problem(what=what, where=str(path), remedy=DAMAGED))
    return value


def read_jsonl(path: Path, *, appended: bool = False) -> list[dict[str, Any]]:
    """Read JSON lines that sftcore wrote.

    Args:
        appended: line by line, so that a crash may have cut the last one, which is then left out.

    Raises:
        UserInputError: the file is missing or can't be read; a line is no JSON object, or the last is cut.
    """
    *lines, last = _read_bytes(path).split(b"\n")
    if last and not appended:
        what = "ends in the middle of a line"
        raise UserInputError(Problem(what=what, where=str(path), remedy=DAMAGED))
    lines += [last] if _is_object(last) else []
    return [_object_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]


def _object_of(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        what, got = f"not JSON lines: {error}", repr(line[:60])
        raise UserInputError(Problem(what=what, where=where, got=got, remedy=DAMAGED)) from error
    if not isinstance(row, dict):
        got = type(row).__name__
        raise UserInputError(Problem(what="must be a mapping", where=where, got=got, remedy=DAMAGED))
    return row


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserInputError(Problem(what="no such file", where=str(path))) from error
    except OSError as error:
        what = f"can't be read: {error.strerror}"
        raise UserInputError(Problem(what=what, where=str(path), remedy=DAMAGED)) from error


def tail_of(path: Path) -> str:
    """The last `TAIL_LINES` lines of a log, whatever bytes are in it."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, through gzip where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes as a hex string."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint_of(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON: stable over runs and machines."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]  # odd file names


@contextlib.contextmanager
def folder_lock(folder: Path, *, purpose: str, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Hold a lock on `folder`/.lock while the block runs; the kernel drops it if the process dies.

    A file system without locks (Lustre mounted without -o flock) gets a warning instead; yields whether the
    lock is held.

    Args:
        wait: wait for another holder instead of refusing (a look at it, `is_locked`, is waited for anyhow).
        shared: with others that share it; an exclusive holder waits for all of them.

    Raises:
        UserInputError: another process holds it (its pid is named).
    """
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+", encoding="utf-8")
    with handle:
        is_held = True
        try:
            _flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait=wait)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise UserInputError(
                Problem(
                    what=f"in use for {purpose} by {holder}",
                    where=str(folder),
                    remedy="wait for it to end, or choose another folder (--run DIR)",
                )
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.getLogger("sftcore").warning(
                "%s: no file locks there; start one process at a time", folder
            )
            is_held = False
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield is_held


def is_locked(folder: Path) -> bool:
    """Whether another process holds `folder`'s lock (not shared); who wants it meanwhile still gets it."""
    try:
        handle = open(folder / ".lock", "rb")
    except FileNotFoundError:
        return False
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return False


def _flock(handle: IO[str], kind: int, *, wait: bool) -> None:
    """Take a lock; one that is refused is tried for again as long as somebody may only be looking."""
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS / 20)
