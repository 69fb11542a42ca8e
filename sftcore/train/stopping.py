"""Stopping: a signal -> a request that ranks agree on; a number that is not finite -> a message with names.

In: SIGUSR1 or SIGTERM to any rank (Slurm sends the first ahead of a time limit); Ctrl-C to a single process.
Out: `requested`, which the engine folds into the collective that each step makes anyway.
Invariant: all ranks stop after the same step, behind the same checkpoint, with exit code 75; a second Ctrl-C
ends a single process at once, with 130.
Trade-off: a request is seen at the end of a step, so the notice must be longer than a step and a save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

from sftcore.errors import EXIT_INTERRUPTED, EXIT_STOPPED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
WITH_INTERRUPT = (*SIGNALS, signal.SIGINT)  # where no launcher hands Ctrl-C on in its own way
MAX_NAMES = 20
Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Have `handler` take these signals while the block runs, then whoever took them before.

    Outside the main thread, where Python installs no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


class StopRequest:
    """Context manager: remembers a stop signal instead of dying of it; a second Ctrl-C ends the process.

    Args:
        numbers: the signals.
    """

    def __init__(self, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
        self.requested = False
        self._is_interrupted = False
        self._handling = handling(numbers, self._remember)

    def __enter__(self) -> StopRequest:
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handling.__exit__(kind, error, trace)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        if self._is_interrupted:
            os._exit(EXIT_INTERRUPTED)
        self._is_interrupted = True
        os.write(2, b"stopping after this step; Ctrl-C again to quit at once\n")


def end_on_stop(
    message: str,
    leave: Callable[[], None] = lambda: None,
    *,
    numbers: Sequence[signal.Signals] = SIGNALS,
) -> None:
    """From now on a stop signal ends this process at once, with `message` on stderr and exit code 75.

    For work that may be killed anywhere and goes on from what is on disk. No exception is raised, which
    clean-up would delay (a pool waits for its workers) and a library's `except` could swallow.

    Args:
        leave: called before the end.
        numbers: the signals.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # workers are forks of it
            os.write(2, f"{message}\n".encode())
            leave()
        os._exit(EXIT_STOPPED)

    for number in numbers:
        signal.signal(number, end)


def name_samples(ids: list[str]) -> str:
    """Ids for a message, at most MAX_NAMES of them.

    >>> name_samples(["f1", "f2"])
    'f1, f2'
    """
    hidden = len(ids) - MAX_NAMES
    return ", ".join(ids[:MAX_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")
