"""Logging and progress, set up once by an entry point.

In: messages and counts. Out: lines on stderr and in a run's run.log; bars on a terminal, plain lines
otherwise.
Invariant: importing this module configures nothing; rank 0 informs, every rank warns with its number.
Trade-off: without a terminal, progress is one line every 10 s, so a batch log stays under 400 lines an
hour.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sftcore.amounts import duration
from sftcore.display import shown

PLAIN_LINE_SECONDS = 10.0
MAX_LETTERS, MAX_LABEL = 20_000, 60
log = logging.getLogger("sftcore")
NOISY = "bitsandbytes.backends.cpu.ops"  # peft imports it; it asks for a package that LoRA does without


class _Plain(logging.Formatter):
    """Lines without passwords and without what a terminal obeys, at most `MAX_LETTERS` long."""

    def format(self, record: logging.LogRecord) -> str:
        """As of any formatter."""
        return shown(super().format(record), MAX_LETTERS)


def setup_logging(*, rank: int = 0, verbose: bool = False) -> None:
    """Send sftcore's log to stderr; ranks other than 0 only warn."""
    level = (logging.DEBUG if verbose else logging.INFO) if rank == 0 else logging.WARNING
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain(prefix + "%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False
    logging.getLogger(NOISY).setLevel(logging.ERROR)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Copy the log, with times, to `path` (appending) while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` units of work; yields `advance(n)`.

    A terminal gets a bar with the remaining time; anything else gets a line every `PLAIN_LINE_SECONDS`.
    """
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        with _bar(label, total) as advance:
            yield advance
        return
    started = last = time.monotonic()
    done = 0

    def advance_plain(n: int = 1) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done and now - last >= PLAIN_LINE_SECONDS:
            last = now
            remaining = (now - started) / done * (total - done)
            log.info("%s: %d/%d, about %s left", label, done, total, duration(round(remaining)))

    yield advance_plain
    log.info("%s: %d/%d in %s", label, done, total, duration(time.monotonic() - started))


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label_column = TextColumn("{task.description}", markup=False)  # a file's name may hold [brackets]
    columns = (label_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(shown(label, MAX_LABEL), total=total)

        def advance(n: int = 1) -> None:
            bar.advance(task, n)

        yield advance
