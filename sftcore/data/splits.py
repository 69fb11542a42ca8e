"""A recipe's splits -> records: which sources, which ids, what may be used.

In: a resolved recipe. Out: `Record`s of "train", "test" or "ood", with every other row in the ledger.
Invariant: records + rejections = rows read; ids are unique within a split (of the same id the first stays).
Trade-off: `load_records` holds a whole split (for probing and evaluation: thousands); training samples are
written by prepare, which never does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sftcore.config import DataSettings, Recipe, Source
from sftcore.data.filters import COMPARED, columns_of, filter_columns, first_reasons, hash_asked
from sftcore.data.filters.columns import Hashes
from sftcore.data.ledger import READING, TRIVIAL, Alteration, Change, Ledger, Reason, Rejection, printable
from sftcore.data.records import Record, id_prefixes, read_source
from sftcore.data.wording import PromptOptions, question_patterns
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import source_files
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.fact import fact_in

log = logging.getLogger(__name__)
HELD_OUT = ("valid", "test", "ood")
NOTHING_ASKED: Hashes = np.empty(0, np.uint64)


def load_records(recipe: Recipe, split: str, ledger: Ledger, *, is_measured: bool = False) -> list[Record]:
    """All usable records of a split; for "train" after comparison with each other and those held out.

    Args:
        is_measured: what a model remembers of them is probed or scored: trivial facts go, too, unless
            `data.trivial_facts` keeps them.

    Raises:
        UserInputError: unusable files, formats that the task can't use, too many rejected rows.
    """
    check_formats(recipe.task, recipe.data)
    records = list(ledger.take(_read_split(recipe, split, ledger)))
    reasons = list(COMPARED) if split == "train" else []
    if is_measured and recipe.data.trivial_facts == "drop":
        reasons += sorted(TRIVIAL)
    if reasons:
        records = list(_filtered(recipe, records, reasons, ledger))
    limit = recipe.data.max_reject_fraction
    ledger.check(limit, reasons=READING, num_rows=ledger.num_rows_read)
    return records


def sources_of(data: DataSettings, split: str) -> list[Source]:
    """The sources of a split: "train", "valid", "test" or "ood"."""
    sources: list[Source] = getattr(data, split)
    return sources


def split_prefixes(data: DataSettings, split: str) -> dict[Path, str]:
    """What ids begin with, for each file of a split."""
    return id_prefixes([file for source in sources_of(data, split) for file in source_files(source)])


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


def hash_held_out(recipe: Recipe) -> Hashes:
    """What leaks are found by: all that is held out; facts also as prompts that verbatim rows may spell out.

    Raises:
        UserInputError: as `held_out_records`.
    """
    form = PromptOptions.of(recipe).form(question_patterns(recipe.data.relations))
    return hash_asked(held_out_records(recipe), lambda content: content.rendered(form))


def with_valid_as_train(recipe: Recipe) -> Recipe:
    """A recipe whose training samples are the validation samples of `recipe`; test items stay held out."""
    data = recipe.data
    swapped = data.model_copy(update={"train": data.valid, "valid": [], "temperature": None})
    return recipe.model_copy(update={"data": swapped})


def check_formats(task: str, data: DataSettings) -> None:
    """Refuse formats that the task can't use.

    Raises:
        UserInputError: naming each of them.
    """
    formats = TASKS[task].formats
    problems = [
        Problem(
            what=f"task {task} can't use format {source.format}",
            where=f"data.{split}.{number}.format",
            allowed=", ".join(formats),
        )
        for split in ("train", *HELD_OUT)
        for number, source in enumerate(sources_of(data, split))
        if source.format not in formats
    ]
    if problems:
        raise UserInputError(*problems)


def _read_split(recipe: Recipe, split: str, ledger: Ledger | None) -> Iterator[Record | Rejection]:
    """Rows of all sources of a split; unusable files are named together, after the rows of the others."""
    prefixes = split_prefixes(recipe.data, split)
    seen: set[str] = set()
    problems: list[Problem] = []
    for source in sources_of(recipe.data, split):
        rows = read_source(
            source,
            split=split,
            labels=recipe.matching.labels,
            prefixes=prefixes,
            ledger=ledger,
            reader=TASKS[recipe.task].formats.get(source.format),
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
    fact = fact_in(record.content) if reason in TRIVIAL else None
    excerpt = f"{fact.subject}: {', '.join(fact.answers)}" if fact else record.id
    return Rejection(file=record.file, row=record.row, reason=reason, excerpt=printable(excerpt))


def _filtered(
    recipe: Recipe, records: list[Record], reasons: Sequence[Reason], ledger: Ledger
) -> Iterator[Record]:
    """Records that no filter drops; exact duplicates stay, and are counted, unless they shall go."""
    asked = NOTHING_ASKED
    if Reason.LEAK in reasons:
        asked = hash_held_out(recipe)
    columns = columns_of(records, asked, finds_trivial=not TRIVIAL.isdisjoint(reasons))
    masks = filter_columns(columns, reasons)
    copies = np.zeros(len(records), bool)
    if not recipe.data.deduplicate:
        copies = masks.pop(Reason.DUPLICATE, copies)
    verdicts = first_reasons(masks, len(records))
    for record, verdict, is_copy in zip(records, verdicts, copies.tolist(), strict=True):
        if is_copy and verdict not in COMPARED:
            ledger.alter(Alteration(file=record.file, row=record.row, change=Change.DUPLICATE_KEPT))
        if verdict is None:
            yield record
        else:
            ledger.reject(_dropped(record, verdict))
