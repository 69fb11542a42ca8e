"""What a killed process leaves: temporaries, unlike those of living ones without a lock on them.

In: a folder. Out: the folder without temporary files and folders that nobody writes any more.
Invariant: what a living process writes stays: it holds a lock on its temporary, which the kernel drops with
the process; where locks do not work nothing is removed.
Trade-off: one more system call a written file (about 1 us), instead of an age at which a temporary counts as
left, which would be too long for a restart and too short for an export.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".*.????????.tmp"  # of fsio's `atomic_file` and `atomic_folder`


def hold(descriptor: int) -> None:
    """Mark an open temporary as one that this process writes."""
    with contextlib.suppress(OSError):  # no locks there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Mark a temporary folder while the block runs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, pattern: str = TEMPORARY) -> None:
    """Remove temporary files and folders directly in `folder` that killed processes have left."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process was faster, or may and this one may not
            if path.is_symlink():
                path.unlink()
            elif not _is_held(path):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
