"""DeepSpeed's C++ operations are built at their first use: neither repeat that nor wait for the dead.

In: this process's environment. Out: PATH with the environment's ninja first; no lock left that nobody holds.
Invariant: a lock is never taken from a process that this one can see.
Trade-off: a builder in another container or on another machine can't be seen, so a lock without a holder is
waited for until it is 1 minute old, 5 on a file system that machines share.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
LOCAL_BUILD_SECONDS, FOREIGN_BUILD_SECONDS = 60.0, 300.0  # DeepSpeed's operations build in 20 to 120 s
POLL_SECONDS = 0.2
SHARED_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "afs",
    "wekafs",
)


def put_own_programs_first() -> None:
    """Let DeepSpeed build with this environment's ninja whether the environment is activated or not.

    Another version of ninja throws the kept build away: up to a minute a start where two versions take turns.
    """
    own, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    is_virtual = sys.prefix != sys.base_prefix  # /usr/bin first could hide a cluster's modules
    if is_virtual and (own / "ninja").exists() and path.split(os.pathsep)[0] != str(own):
        os.environ["PATH"] = f"{own}{os.pathsep}{path}"


def await_other_builds() -> None:
    """Wait for builds of DeepSpeed's operations that are under way, and remove the locks of killed ones.

    torch itself would wait for a killed build's lock without an end or a word.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        with contextlib.suppress(FileNotFoundError):
            _await(lock)


def _await(lock: Path) -> None:
    """Return when `lock` is gone or was removed as nobody's.

    Raises:
        FileNotFoundError: it went away meanwhile.
    """
    patience = FOREIGN_BUILD_SECONDS if _is_shared(lock) else LOCAL_BUILD_SECONDS
    is_told = False
    while True:
        age = time.time() - lock.stat().st_mtime
        is_held = _has_holder(lock)
        if not is_held and age > patience:
            log.warning("%s: a build was killed here; building anew", lock.parent)
            return lock.unlink()
        if not is_told:
            until = "" if is_held else f" up to {patience - age:.0f} s more"
            log.info(
                "another process builds %s: waiting%s; delete %s if none does", lock.parent.name, until, lock
            )
            is_told = True
        time.sleep(POLL_SECONDS)


def _has_holder(lock: Path) -> bool:
    """Whether a process of this machine keeps the lock open (torch's FileBaton does while it builds)."""
    wanted = lock.stat()
    return any(os.path.samestat(wanted, opened) for opened in _opened_files())


def _opened_files() -> Iterator[os.stat_result]:
    """What every process of this machine has open, as far as this user may see it."""
    for entry in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            for name in os.listdir(entry):
                with contextlib.suppress(OSError):
                    yield os.stat(entry / name)


def _is_shared(path: Path) -> bool:
    """Whether `path` lies on a file system that other machines can mount, too, or on one that isn't known."""
    mounts = psutil.disk_partitions(all=True)
    around = [m for m in mounts if path.resolve().is_relative_to(m.mountpoint)]
    if not around:
        return True
    return max(around, key=lambda m: len(m.mountpoint)).fstype.lower().startswith(SHARED_FILE_SYSTEMS)
