"""Stopping: a signal -> a request that ranks agree on; a number that is not finite -> a message with names.

In: SIGUSR1 or SIGTERM to any rank (Slurm sends the first ahead of a time limit); Ctrl-C to a single process.
Out: `requested`, which the engine folds into the collective that each step makes anyway.
Invariant: all ranks stop after the same step, after the same checkpoint, with exit code 75; a second Ctrl-C
ends a single process at once, with 130. However a process is ended, it leaves its exit code first.
Trade-off: a request is seen after each backward pass (between packs where these take long), so the notice
must be longer than a few packs and a save; a step that is not whole by then is given up, at worst its packs
but one are computed again.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from sftcore.errors import EXIT_INTERRUPTED, EXIT_STOPPED

log = logging.getLogger(__name__)
NOTICE = "SFTCORE_NOTICE"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
WITH_INTERRUPT = (*SIGNALS, signal.SIGINT)  # where no launcher hands Ctrl-C on in its own way
MAX_NAMES = 20
LOOK_SECONDS = 10.0  # of computing between two looks at a stop request: a look waits for the slowest rank
Handler = Callable[[int, FrameType | None], None]


class Abandoned(Exception):
    """A rank was asked to stop in the middle of a step or an evaluation, of which nothing was applied."""


def packs_between_looks(seconds: float, num_packs: int) -> int:
    """After how many packs ranks agree on whether to stop, from how long the last step's took.

    >>> packs_between_looks(1.0, 4), packs_between_looks(190.0, 19), packs_between_looks(60.0, 1)
    (40, 1, 1)
    """
    return max(1, math.floor(LOOK_SECONDS * num_packs / seconds)) if seconds > 0 else 1


_leavers: list[Callable[[int], None]] = []


def leave_codes_with(leave: Callable[[int], None]) -> None:
    """Have `leave` called with the exit code whenever this process ends itself at once."""
    _leavers.append(leave)


def end_at_once(code: int) -> NoReturn:
    """End this process without clean-up, which could hang in its turn; its exit code is left first."""
    for leave in _leavers:
        with suppress(OSError):  # a full disk must not keep it alive
            leave(code)
    os._exit(code)


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
            end_at_once(EXIT_INTERRUPTED)
        self._is_interrupted = True
        os.write(2, b"stopping after this step; Ctrl-C again to quit at once\n")


class StopNotice:
    """How long before its end this process is asked to stop, held against how long it takes to stop here."""

    def __init__(self, seconds: float | None) -> None:
        """`seconds` of notice; None: nobody gives any."""
        self.seconds = seconds
        self._piece = self._save = 0.0
        self._is_told = False

    @classmethod
    def of_environment(cls) -> StopNotice:
        """Of a job of our batch scripts, which name their signal's lead in SFTCORE_NOTICE."""
        given = os.environ.get(NOTICE, "")
        return cls(float(given) if given.isdigit() else None)

    def see_step(self, seconds: float, num_packs: int) -> None:
        """A step has taken so long on ranks of so many packs."""
        self._piece = max(self._piece, min(seconds, max(LOOK_SECONDS, seconds / max(1, num_packs))))
        self._check()

    def see_save(self, seconds: float) -> None:
        """A checkpoint has taken so long."""
        self._save = max(self._save, seconds)
        self._check()

    def _check(self) -> None:
        needed = self._piece + self._save
        if self.seconds is None or self._is_told or needed <= self.seconds:
            return
        self._is_told = True
        log.warning(
            "a stop takes up to %.0f s here (%.0f s of a step, %.0f s to save), but this job is warned %.0f s"
            " ahead of its end, so that steps after the last checkpoint would be lost: ask for more, as"
            " --sbatch signal=B:USR1@%d",
            needed,
            self._piece,
            self._save,
            self.seconds,
            math.ceil(1.5 * needed),
        )


def end_on_stop(message: str, *, numbers: Sequence[signal.Signals] = SIGNALS) -> None:
    """From now on a stop signal ends this process at once, with `message` on stderr and exit code 75.

    For work that may be killed anywhere and goes on from what is on disk. No exception is raised, which
    clean-up would delay (a pool waits for its workers) and a library's `except` could swallow.

    Args:
        numbers: the signals.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # workers are forks of it
            os.write(2, f"{message}\n".encode())
            end_at_once(EXIT_STOPPED)
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
