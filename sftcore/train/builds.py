"""DeepSpeed's C++ operations are built at their first use: neither repeat that nor wait for the dead.

In: this process's environment. Out: PATH with the environment's ninja first; no lock left that nobody holds.
Invariant: no lock is taken from a process that this one can see, and one process at a time takes one.
Trade-off: a builder in another container or on another machine can't be seen, so a lock without a holder is
waited for until nothing was written next to it for 2 minutes, or 5 on a file system that machines share.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from sftcore.fsio import folder_lock

log = logging.getLogger(__name__)
LOCAL_SECONDS, SHARED_SECONDS = 120.0, 300.0  # a file of DeepSpeed's operations compiles in 20 to 60 s
POLL_SECONDS = 0.5
OWN_FILES = ".lock"  # how the names of what a look leaves begin
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


def finds_library(name: str) -> bool:
    """Whether a folder that linkers look into holds a library to build with; none is run.

    Folders: of LIBRARY_PATH, of -L in CFLAGS and LDFLAGS, of this environment, of the system.
    """
    flags = f"{os.environ.get('CFLAGS', '')} {os.environ.get('LDFLAGS', '')}".split()
    given = [flag.removeprefix("-L") for flag in flags if flag.startswith("-L")]
    given += os.environ.get("LIBRARY_PATH", "").split(os.pathsep)
    system = [f"{root}/{lib}" for root in (sys.prefix, "/usr", "/usr/local", "") for lib in ("lib", "lib64")]
    kind = sysconfig.get_config_var("MULTIARCH") or "."
    folders = [*filter(None, given), *system, *(f"{folder}/{kind}" for folder in system)]
    return any((Path(folder) / f"lib{name}{end}").exists() for folder in folders for end in (".so", ".a"))


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
    patience = SHARED_SECONDS if _is_shared(lock) else LOCAL_SECONDS
    is_told = False
    while True:
        with folder_lock(lock.parent, purpose="a look at builds", wait=True):
            is_held, rest = _has_holder(lock), _seconds_at_rest(lock.parent)
            if not is_held and rest > patience:
                log.warning("%s: a build was killed here; building again", lock.parent)
                return lock.unlink()
        if not is_told:
            until = "" if is_held else f" up to {patience - rest:.0f} s more"
            name = lock.parent.name
            log.info("another process builds %s: waiting%s; delete %s if none does", name, until, lock)
            is_told = True
        time.sleep(POLL_SECONDS)


def _seconds_at_rest(folder: Path) -> float:
    """Since a build wrote its last file there, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=OWN_FILES) as now:
        times = [file.stat().st_mtime for file in folder.iterdir() if not file.name.startswith(OWN_FILES)]
        return os.stat(now.name).st_mtime - max(times)


def _has_holder(lock: Path) -> bool:
    """Whether a process of this user keeps the lock open, as torch's FileBaton does while it builds."""
    lock.stat()
    wanted = str(lock.resolve())
    for opened in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            if os.readlink(opened) == wanted:
                return True
    return False


def _is_shared(path: Path) -> bool:
    """Whether `path` lies on a file system that other machines can mount, too, or on one that isn't known."""
    mounts = psutil.disk_partitions(all=True)
    around = [m for m in mounts if path.resolve().is_relative_to(m.mountpoint)]
    if not around:
        return True
    return max(around, key=lambda m: len(m.mountpoint)).fstype.lower().startswith(SHARED_FILE_SYSTEMS)
