"""Code of others, run within bounds: a chat template that loops or swells ends with an exception.

In: a block that runs it. Out: what it gives, or `TookTooMuch`.
Invariant: afterwards the process's timer, signal handler and memory limit are what they were.
Trade-off: seconds are the process's own (a busy machine ends nothing), counted in the main thread only, where
Python delivers signals; elsewhere memory alone is bounded. About 15 microseconds a block.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sftcore.amounts import size

SECONDS = 10.0  # published templates take 0.1 ms a chat
SPARE_BYTES = 2**30
PAGES_FILE = "/proc/self/statm"  # of Linux
PAGE_BYTES = resource.getpagesize()


class TookTooMuch(Exception):
    """The block took more time or memory than it was given."""


@contextmanager
def bounded(seconds: float = SECONDS, spare_bytes: int = SPARE_BYTES) -> Iterator[None]:
    """Run the block with so much processor time and so much memory on top of what is in use.

    Raises:
        TookTooMuch: it is not enough.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    is_timed = threading.current_thread() is threading.main_thread()

    def end(number: int, frame: FrameType | None) -> None:
        raise TookTooMuch(f"it does not end within {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, end) if is_timed else None
    try:
        _limit_memory(limits, spare_bytes)
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except MemoryError as error:
        raise TookTooMuch(f"it needs over {size(spare_bytes)} of memory") from error
    finally:
        if is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _limit_memory(limits: tuple[int, int], spare_bytes: int) -> None:
    """Lower this process's limit on its address space; where that isn't known, leave it."""
    if not os.path.exists(PAGES_FILE):
        return
    with open(PAGES_FILE, "rb") as handle:
        allowed = int(handle.read().split()[0]) * PAGE_BYTES + spare_bytes
    soft, hard = limits
    if soft == resource.RLIM_INFINITY or allowed < soft:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
