"""A recipe's splits -> records: which sources, which ids, what may be used.

In: a resolved recipe. Out: `Record`s of "train", "test" or "ood", with every other row in the ledger.
Invariant: records + rejections = rows read; ids are unique within a split (of the same id the first stays).
Trade-off: `load_records` holds a whole split (for probing and evaluation: thousands); training samples are
written by prepare, which never does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from sftcore.config import Recipe, Source
from sftcore.data.hygiene import Render, judge
from sftcore.data.ledger import READING, Alteration, Change, Ledger, Reason, Rejection, printable
from sftcore.data.records import Record, id_prefixes, read_source
from sftcore.data.wording import PromptOptions, question_patterns
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import source_files
from sftcore.tasks import TASKS

log = logging.getLogger(__name__)
HELD_OUT = ("valid", "test", "ood")


def load_records(recipe: Recipe, split: str, ledger: Ledger) -> list[Record]:
    """All usable records of a split; for "train" after hygiene against those held out.

    Raises:
        UserInputError: unusable files, formats that the task can't use, too many rejected rows.
    """
    check_formats(recipe)
    records = list(ledger.take(_read_split(recipe, split, ledger)))
    if split == "train":
        records = list(_clean(recipe, records, ledger))
    limit = recipe.data.max_reject_fraction
    ledger.check(limit, reasons=READING, num_rows=ledger.num_rows_read)
    return records


def load_items(recipe: Recipe, split: str, ledger: Ledger | None = None) -> list[Record]:
    """The held-out records that are probed and evaluated; empty if the recipe has no such source.

    Args:
        split: "valid", "test" or "ood".
    """
    assert split in HELD_OUT
    return load_records(recipe, split, ledger or Ledger())


def sources_of(recipe: Recipe, split: str) -> list[Source]:
    """The sources of a split: "train", "valid", "test" or "ood"."""
    sources: list[Source] = getattr(recipe.data, split)
    return sources


def split_prefixes(recipe: Recipe, split: str) -> dict[Path, str]:
    """What ids begin with, for each file of a split."""
    return id_prefixes([file for source in sources_of(recipe, split) for file in source_files(source)])


def held_out_records(recipe: Recipe) -> Iterator[Record]:
    """What is held out, for comparison with the training rows; odd rows are left out, and counted in the log.

    Raises:
        UserInputError: naming every file that is unusable, or has too many odd rows to be compared with.
    """
    problems: list[Problem] = []
    for split in HELD_OUT:
        ledger = Ledger()
        try:
            yield from ledger.take(_read_split(recipe, split, ledger))
            ledger.check(recipe.data.max_reject_fraction, reasons=READING, num_rows=ledger.num_rows_read)
        except UserInputError as error:
            problems += error.problems
        if ledger.num_rejected:
            log.warning("%s: %d odd rows are not held against training rows", split, ledger.num_rejected)
    if problems:
        raise UserInputError(*problems)


def render_held_out(recipe: Recipe) -> Render:
    """How held-out facts become prompts: a verbatim training prompt may spell one out."""
    form = PromptOptions.of(recipe).form(question_patterns(recipe.data.relations))
    return lambda content: content.rendered(form)


def with_valid_as_train(recipe: Recipe) -> Recipe:
    """A recipe whose training samples are the validation samples of `recipe`; test items stay held out."""
    data = recipe.data
    swapped = data.model_copy(update={"train": data.valid, "valid": [], "temperature": None})
    return recipe.model_copy(update={"data": swapped})


def check_formats(recipe: Recipe) -> None:
    """Refuse formats that the task can't use.

    Raises:
        UserInputError: naming each of them.
    """
    formats = TASKS[recipe.task].formats
    problems = [
        Problem(
            what=f"task {recipe.task} can't use format {source.format}",
            where=f"data.{split}.{number}.format",
            allowed=", ".join(formats),
        )
        for split in ("train", *HELD_OUT)
        for number, source in enumerate(sources_of(recipe, split))
        if source.format not in formats
    ]
    if problems:
        raise UserInputError(*problems)


def _read_split(recipe: Recipe, split: str, ledger: Ledger | None) -> Iterator[Record | Rejection]:
    """Rows of all sources of a split; unusable files are named together, after the rows of the others."""
    prefixes = split_prefixes(recipe, split)
    seen: set[str] = set()
    problems: list[Problem] = []
    for source in sources_of(recipe, split):
        rows = read_source(
            source, split=split, labels=recipe.matching.labels, prefixes=prefixes, ledger=ledger
        )
        try:
            yield from _unrepeated(rows, seen)
        except UserInputError as error:
            problems += error.problems
    if problems:
        raise UserInputError(*problems)


def _unrepeated(rows: Iterable[Record | Rejection], seen: set[str]) -> Iterator[Record | Rejection]:
    """`rows`, of records with the same id only the first."""
    for row in rows:
        if isinstance(row, Record) and row.id in seen:
            yield _dropped(row, Reason.DUPLICATE_ID)
            continue
        if isinstance(row, Record):
            seen.add(row.id)
        yield row


def _dropped(record: Record, reason: Reason) -> Rejection:
    return Rejection(file=record.file, row=record.row, reason=reason, excerpt=printable(record.id))


def _clean(recipe: Recipe, records: list[Record], ledger: Ledger) -> Iterator[Record]:
    """Training records without leaks, contradictions and (if asked for) duplicates."""
    verdicts = judge(records, held_out_records(recipe), render_held_out(recipe))
    for record, verdict in zip(records, verdicts, strict=True):
        if verdict is Reason.DUPLICATE and not recipe.data.deduplicate:
            ledger.alter(Alteration(file=record.file, row=record.row, change=Change.DUPLICATE_KEPT))
            verdict = None
        if verdict is None:
            yield record
        else:
            ledger.reject(_dropped(record, verdict))
