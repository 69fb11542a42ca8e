"""Who may write a run folder, across machines; and a rank's watch over those it depends on.

In: RUN/lease.json, this process's ancestors. Out: a stop request when a launcher dies; an end at once when
another process has taken the run over.
Invariant: a run has one writer: the holder of RUN/.lock, named in RUN/lease.json; ranks of any other holder
end within `LEASE_SECONDS` of being able to read that file.
Trade-off: each rank reads one small file every 5 s. Only a later attempt of the same Slurm job takes over
from a living holder (its node may be cut off, and can't be asked); anybody else is refused.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from sftcore.errors import EXIT_FAILED, EXIT_USER_INPUT, UserInputError
from sftcore.fsio import folder_lock, write_json
from sftcore.train.stopping import end_at_once

log = logging.getLogger("sftcore.lease")
LEASE = "lease.json"
WATCH_SECONDS, LEASE_SECONDS = 1.0, 5.0
TAKE_OVER_SECONDS = 120.0  # NFS gives a lost client's locks away after 90 s (Linux knfsd's default lease)
ORPHAN_SECONDS = 300.0  # from the launcher's death: time for a last step and a save
LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "sftcore", "sftcore.launcher.cli")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The content of lease.json.

    Args:
        holder: unlike any other's.
        job: number of the Slurm job, "" outside of Slurm.
        attempt: how often that job was queued again.
        place: process and machine, for messages.
    """

    holder: str
    job: str
    attempt: int
    place: str

    @classmethod
    def mine(cls) -> Lease:
        """A new lease for this process."""
        return cls(
            holder=uuid.uuid4().hex,
            job=os.environ.get("SLURM_JOB_ID", ""),
            attempt=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            place=f"process {os.getpid()} on {os.uname().nodename}",
        )

    def succeeds(self, other: Lease) -> bool:
        """Whether this is a later attempt of the other's job."""
        return self.job != "" and self.job == other.job and self.attempt > other.attempt


def read_lease(run: Path) -> Lease | None:
    """The lease of a run; None where there is none or it can't be read now."""
    try:
        return Lease(**json.loads((run / LEASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def take_over(run: Path, lease: Lease) -> None:
    """If an earlier attempt of this job still holds the run, name the new holder and wait for it to end.

    Returns at once in all other cases; whether the run is free is then up to its lock.
    """
    earlier = read_lease(run)
    if earlier is None or not lease.succeeds(earlier):
        return
    write_lease(run, lease)
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    while time.monotonic() < deadline:
        try:
            with folder_lock(run, purpose="training"):
                return
        except UserInputError:
            log.info("waiting for %s to give up %s", earlier.place, run)
            time.sleep(WATCH_SECONDS)


def write_lease(run: Path, lease: Lease) -> None:
    """Name the holder of a run."""
    write_json(run / LEASE, asdict(lease))


def launchers_above() -> list[psutil.Process]:
    """The launchers between this process and the shell: deepspeed's, ours, slurmstepd; nearest first."""
    found = []
    for process in psutil.Process().parents():
        if not _is_launcher(process):
            break
        found.append(process)
    return found


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    names = {os.path.basename(word) for word in words[:4]}
    return bool(names & set(LAUNCHERS)) or " ".join(words).startswith("slurmstepd")


class Watch:
    """Context manager: a thread that asks every second whether the launchers live and the lease stands.

    A dead launcher is a stop request (SIGTERM to this process); if the process still runs after
    `ORPHAN_SECONDS`, it ends. A lost lease ends it at once.
    """

    def __init__(self, launchers: Sequence[psutil.Process]) -> None:
        self.holder = ""  # of the lease that this process took; rank 0's counts
        self._launchers = launchers
        self._done = threading.Event()
        self._lease: tuple[Path, str] | None = None
        self._is_confirmed = False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def keep_lease(self, run: Path, holder: str) -> None:
        """From now on, end when `run` is held by another one than `holder`."""
        self._lease = (run, holder)

    def _look(self) -> None:
        orphaned_at = None
        looked_at = 0.0
        while not self._done.wait(WATCH_SECONDS):
            now = time.monotonic()
            if now - looked_at >= LEASE_SECONDS:
                looked_at = now
                self._check_lease()
            if orphaned_at is None and not all(map(_lives, self._launchers)):
                orphaned_at = now
                log.warning("the launcher is gone: stopping after a checkpoint")
                os.kill(os.getpid(), signal.SIGTERM)
            if orphaned_at is not None and now - orphaned_at > ORPHAN_SECONDS:
                log.error("no checkpoint within %.0f s of the launcher's end", ORPHAN_SECONDS)
                end_at_once(EXIT_FAILED)

    def _check_lease(self) -> None:
        # A network file system may show the lease before ours for a while: ours must have been seen once.
        lease = read_lease(self._lease[0]) if self._lease else None
        if lease is None or self._lease is None:
            return
        if lease.holder == self._lease[1]:
            self._is_confirmed = True
        elif self._is_confirmed:
            log.error("%s was taken over by %s: ending", self._lease[0], lease.place)
            end_at_once(EXIT_USER_INPUT)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
