"""Files that are whole or absent: atomic writes, JSON lines, checksums, folder locks.

In: bytes, JSON values, paths. Out: files that a crash or a full disk can't leave half-written under their
real name.
Invariant: the final name appears only by `os.replace` of a flushed temporary sibling.
Trade-off: each atomic write costs one fsync (about 1 ms on an SSD, 10 ms on network storage), so per-step
metrics are appended line by line instead, and readers drop a torn last line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without them
TAIL_LINES = 6  # of a log, in a message
LOOK_SECONDS = 0.5  # a look holds a lock for microseconds, on network storage for milliseconds


SPECIAL_FILES = {
    stat.S_IFDIR: "this is a folder, not a file",
    stat.S_IFIFO: "this is a pipe, not a file: it can't be read twice",
    stat.S_IFCHR: "this is a device, not a file",
    stat.S_IFBLK: "this is a device, not a file",
    stat.S_IFSOCK: "this is a socket, not a file",
}


def file_fault(path: Path | str) -> str:
    """Why a path can't be read as a file; empty for a file (also behind links)."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return "no such file: a link that leads nowhere" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:  # too long a name, links in a circle; a NUL in the name
        return f"no such file: {error.strerror if isinstance(error, OSError) else error}"
    return SPECIAL_FILES.get(kind, "")


@contextlib.contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" and "read-only" into a message that names the folder and the remedy.

    Raises:
        MissingEnvironmentError: on ENOSPC, EDQUOT, EROFS or EACCES.
    """
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free space there, or point --run / the cache to another disk",
            errno.EDQUOT: "your quota there is used up: free space, or use another disk",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "you may not write there: choose another folder or mend its permissions",
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
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    encoding, newline, errors = (None, None, None) if "b" in mode else ("utf-8", "\n", "backslashreplace")
    with disk_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=encoding, newline=newline, errors=errors) as handle:
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with disk_errors_explained(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            sync_folder(temporary)
            if path.exists() and not keep_existing:
                shutil.rmtree(path)
            _rename_folder(temporary, path, keep_existing=keep_existing)
            sync_entry(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as one line in a single write."""
    with disk_errors_explained(path), open(path, "a", encoding="utf-8", newline="\n") as handle:
        handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that sftcore wrote.

    Raises:
        UserInputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserInputError(Problem(what="no such file", where=str(path))) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserInputError(Problem(what=f"not valid JSON: {error}", where=str(path))) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines that sftcore wrote; a torn last line (a crash during an append) is left out."""
    with open(path, encoding="utf-8") as handle:
        lines = handle.read().split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    with contextlib.suppress(json.JSONDecodeError):
        rows += [json.loads(lines[-1])] if lines[-1] else []
    return rows


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
