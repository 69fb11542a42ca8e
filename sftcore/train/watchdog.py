"""The watchdog: a rank that is gone or stuck -> the job ends with its number, instead of waiting forever.

In: a sign of life from every rank each `BEAT_SECONDS`; the time of each finished step. Out: nothing, or one
message and exit code 1 (hanging, with every thread's stack) or 69 (another rank is gone).
Invariant: a rank that is gone ends the job within 60 s, one that hangs in a step within `train.hang_seconds`;
loading, saving, evaluating and the first step are never taken for hanging.
Trade-off: beats go through the rendezvous store next to the collectives (one small message a rank and 5 s, on
a thread), since a rank that waits in a collective can't look for itself.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from sftcore import dist
from sftcore.errors import EXIT_FAILED, EXIT_RANK_LOST
from sftcore.train.stopping import end_at_once

BEAT_SECONDS = 5.0
GONE_SECONDS = 40.0  # without a sign of life
STORE_TIMEOUT = timedelta(seconds=15)
MIN_HANG_SECONDS, HANG_STEPS = 300.0, 10
MEDIAN_OF_STEPS = 50


class Watchdog:
    """Context manager around training; without `with` it watches nothing."""

    def __init__(self, hang_seconds: float | None = None) -> None:
        """Prepare.

        Args:
            hang_seconds: longest time without a finished step; None: max(300, 10 median steps).
        """
        self._hang_seconds = hang_seconds
        self._step_seconds: deque[float] = deque(maxlen=MEDIAN_OF_STEPS)
        self._armed_at: float | None = None
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._thread:
            self._thread.join(timeout=BEAT_SECONDS)

    @property
    def hang_seconds(self) -> float:
        """Longest time that a step may take."""
        if self._hang_seconds is not None:
            return self._hang_seconds
        median = statistics.median(self._step_seconds) if self._step_seconds else 0.0
        return max(MIN_HANG_SECONDS, HANG_STEPS * median)

    def step_done(self, seconds: float) -> None:
        """A step has ended; from now on the next one is timed."""
        self._step_seconds.append(seconds)
        self._armed_at = time.monotonic()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Not timed inside."""
        was_armed, self._armed_at = self._armed_at is not None, None
        yield
        if was_armed:
            self._armed_at = time.monotonic()

    def _watch(self) -> None:
        signs = SignsOfLife() if dist.world_size() > 1 else None
        while not self._ending.wait(BEAT_SECONDS):
            armed_at = self._armed_at
            if armed_at is not None and time.monotonic() - armed_at > self.hang_seconds:
                _end(
                    f"rank {dist.rank()}: no step has ended for {self.hang_seconds:.0f} s "
                    "(train.hang_seconds); its stacks follow",
                    code=EXIT_FAILED,
                    stacks=True,
                )
            if signs and (silent := signs.silent_ranks()) and not self._ending.is_set():
                names = ", ".join(map(str, silent))
                _end(
                    f"rank {names} gave no sign of life for {GONE_SECONDS:.0f} s; "
                    "start again to go on from the newest checkpoint",
                    code=EXIT_RANK_LOST,
                )


class SignsOfLife:
    """Beats of all ranks in the rendezvous store."""

    def __init__(self) -> None:
        """Join; the store is the process group's own, over a connection of this thread."""
        store: Any = _get_default_store()
        own: Store = store.clone()
        own.set_timeout(STORE_TIMEOUT)
        self._store = PrefixStore("sftcore/alive", own)
        self._count = 0
        self._seen = {rank: (-1, time.monotonic()) for rank in range(dist.world_size())}
        self._store_lost_at: float | None = None

    def silent_ranks(self) -> list[int]:
        """Beat, and say which ranks have not for `GONE_SECONDS`; [0] if the store itself is gone."""
        now = time.monotonic()
        try:
            self._count += 1
            self._store.add(str(dist.rank()), 1)
            beats = {rank: self._store.add(str(rank), 0) for rank in self._seen}
        except RuntimeError:  # torch.distributed's errors are
            self._store_lost_at = self._store_lost_at or now
            return [0] if now - self._store_lost_at > GONE_SECONDS - STORE_TIMEOUT.seconds else []
        self._store_lost_at = None
        for rank, beat in beats.items():
            if beat != self._seen[rank][0]:
                self._seen[rank] = (beat, now)
        return [rank for rank, (_, at) in self._seen.items() if now - at > GONE_SECONDS]


def _end(message: str, *, code: int, stacks: bool = False) -> None:
    """End this process at once: its main thread waits in a collective that will not come back."""
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr)
    end_at_once(code)
