"""Stopping: a signal -> a request that ranks agree on; a number that is not finite -> a message with names.

In: SIGUSR1 or SIGTERM to any rank (Slurm sends the first ahead of a time limit). Out: `requested`, which the
engine folds into the collective that each step makes anyway.
Invariant: all ranks stop after the same step, behind the same checkpoint, with exit code 75.
Trade-off: a request is seen at the end of a step, so the notice must be longer than a step and a save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from sftcore.errors import EXIT_STOPPED

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
MAX_NAMES = 20


class StopRequest:
    """Context manager: remembers a stop signal instead of dying of it.

    Outside the main thread (where Python installs no handlers) it never requests anything.
    """

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def end_on_stop(message: str, leave: Callable[[], None] = lambda: None) -> None:
    """From now on a stop signal ends this process at once, with `message` on stderr and exit code 75.

    For work that may be killed anywhere and goes on from what is on disk. No exception is raised, which
    clean-up would delay (a pool waits for its workers) and a library's `except` could swallow.

    Args:
        leave: called before the end.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # workers are forks of it
            os.write(2, f"{message}\n".encode())
            leave()
        os._exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, end)


def name_samples(ids: list[str]) -> str:
    """Ids for a message, at most MAX_NAMES of them.

    >>> name_samples(["f1", "f2"])
    'f1, f2'
    """
    hidden = len(ids) - MAX_NAMES
    return ", ".join(ids[:MAX_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")
