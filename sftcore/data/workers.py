"""Units of work -> parts, on all cores.

In: units, and what every worker needs. Out: one part folder a unit; the problems of files that can't be read.
Invariant: which process writes a part, and when, changes nothing in it; a killed parent takes its workers
along, so that no orphan holds the lock.
Trade-off: workers are forked, so they start with the tokenizer loaded (a fresh interpreter imports
transformers for 2 s); each encodes with one thread, so that reading and checking rows use all cores too.
Threads were tried: they took 17 % less CPU time, and waited for Python's lock as long.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sftcore.config import Recipe
from sftcore.data.fingerprint import Wanted
from sftcore.data.ledger import Ledger
from sftcore.data.parts import part_name, write_part
from sftcore.data.prompts import Prompter, Refusal
from sftcore.data.records import Record, span_records
from sftcore.data.seam import Encoded
from sftcore.data.units import Unit
from sftcore.errors import Problem, SftError, UserInputError
from sftcore.log import progress
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.content import Content

POOL_BYTES = 2**20  # less text than this is done before a pool has started
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What every worker needs.

    Args:
        recipe: resolved.
        prompter: of the recipe.
        prefixes: what ids of each file's rows begin with.
        wanted: ids to encode, with answers to train that are not the records' own; None: all.
        folder: where parts go.
    """

    recipe: Recipe
    prompter: Prompter
    prefixes: Mapping[Path, str]
    wanted: Wanted | None
    folder: Path

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit's part is there (parts appear whole)."""
        return (self.folder / part_name(unit.number) / "part.json").is_file()

    def write(self, unit: Unit) -> None:
        """Make the unit's part.

        Raises:
            UserInputError: the file is unusable.
        """
        ledger = Ledger()
        source = self.recipe.data.train[unit.source]
        rows = span_records(
            source,
            unit.file,
            split="train",
            labels=self.recipe.matching.labels,
            prefix=self.prefixes[unit.file],
            span=unit.span,
            limit=unit.limit,
            note=ledger.alter,
            reader=TASKS[self.recipe.task].formats[source.format],
        )
        about = {"source": unit.source, "file": os.fsencode(unit.file).decode("utf-8", "backslashreplace")}
        part = self.folder / part_name(unit.number)
        with _collector_off():
            write_part(part, rows, self.encode, ledger=ledger, about=about)

    def encode(self, records: Sequence[Record]) -> list[Encoded | Refusal | None]:
        """Samples of the wanted records, None for the others."""
        chosen = [self.wanted is None or record.id in self.wanted for record in records]
        contents = [self._content(r) for r, is_chosen in zip(records, chosen, strict=True) if is_chosen]
        encoded = iter(self.prompter.encode_batch(contents))
        return [next(encoded) if is_chosen else None for is_chosen in chosen]

    def _content(self, record: Record) -> Content:
        answers = self.wanted.get(record.id) if self.wanted else None
        return record.content if answers is None else record.content.with_answers(answers)

    def clean(self, units: Iterable[Unit]) -> None:
        """Remove what a killed process left half-written of these units."""
        for unit in units:
            for leftover in self.folder.glob(f".{part_name(unit.number)}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)


def default_num_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def write_parts(workshop: Workshop, units: Sequence[Unit], *, num_workers: int) -> list[Problem]:
    """Make the parts of `units` that are not there yet; returns the problems of files that can't be read.

    Raises:
        MissingEnvironmentError: disk full, read-only or not permitted.
        SftError: a worker was killed.
    """
    todo = [unit for unit in units if not workshop.is_done(unit)]
    num_bytes = sum(unit.num_bytes for unit in todo)
    num_workers = min(num_workers, len(todo))
    problems: list[Problem] = []
    with progress("kB of data prepared", max(1, num_bytes >> 10)) as advance:
        if num_workers < 2 or num_bytes < POOL_BYTES:
            for unit in todo:
                problems += _problems_of(workshop, unit)
                advance(max(1, unit.num_bytes >> 10))
            return problems
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_workers, context, _start_worker, (workshop, os.getpid())) as pool:
            largest_first = sorted(todo, key=lambda unit: -unit.num_bytes)
            futures = {pool.submit(_write_in_worker, unit): unit for unit in largest_first}
            for done in as_completed(futures):
                problems += _result(done, pool)
                advance(max(1, futures[done].num_bytes >> 10))
    return problems


def _problems_of(workshop: Workshop, unit: Unit) -> list[Problem]:
    try:
        workshop.write(unit)
    except UserInputError as error:
        return list(error.problems)
    return []


def _result(done: Future[list[Problem]], pool: ProcessPoolExecutor) -> list[Problem]:
    try:
        return done.result()
    except BrokenProcessPool as error:
        remedy = "run it again with fewer workers (--workers); finished parts are kept"
        raise SftError(
            Problem(what="a worker process was killed (out of memory?)", where="prepare", remedy=remedy)
        ) from error
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextmanager
def _collector_off() -> Iterator[None]:
    """Rows and ids form no cycles; looking for some in 1,024 rows' lists took a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_workshop: Workshop | None = None  # of this worker process


def _start_worker(workshop: Workshop, parent: int) -> None:
    global _workshop
    _workshop = workshop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _write_in_worker(unit: Unit) -> list[Problem]:
    assert _workshop is not None
    return _problems_of(_workshop, unit)
