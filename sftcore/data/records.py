"""From data files to `Record`s: what a row says, whatever format it came in.

In: a `Source` of the recipe. Out: `Record`s and `Rejection`s in file order.
Invariant: each row read yields exactly one of the two; white space around the texts of facts and pairs is
trimmed and counted, `jsonl` is verbatim.
Trade-off: `limit` is shared evenly among a glob's files, so that 2,000 rows of `P*.train.json` hold every
relation; that costs a first pass that counts up to `limit` rows per file (1 s for 176,560 questions).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from sftcore.data.arrow import arrow_rows, is_arrow
from sftcore.data.contents import (
    Chat,
    Completion,
    Content,
    Fact,
    Fields,
    Message,
    OddRow,
    Pair,
    Parsed,
    label_numbers,
    parse_id,
    parse_unlabelled,
    read_label,
)
from sftcore.data.examples import named_rows
from sftcore.data.ledger import (
    DETAIL_CHARACTERS,
    REMEDIES,
    Ledger,
    Reason,
    Rejection,
    printable,
    printable_path,
)
from sftcore.data.rows import WHOLE, Note, RawRow, Span, damaged, ignore, json_list_rows, json_rows, suffix_of
from sftcore.data.subjects import recover_subjects
from sftcore.data.tables import choose_columns, object_rows, pair_rows
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import source_files
from sftcore.settings import LabelWords
from sftcore.sources import Columns, Source
from sftcore.tasks.formats import READERS, Reader
from sftcore.tasks.kinds.fact import fact_in

__all__ = ["Chat", "Completion", "Content", "Fact", "Message", "Pair", "Record", "id_prefixes", "read_source"]
RELATION_IN_NAME = re.compile(r"(P\d+)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One usable row.

    Args:
        id: the row's own id, else "<file stem>:<row>"; unique within a split.
        split: "train", "valid", "test" or "ood".
        file: path of the file it stands in.
        row: 1-based; header lines do not count.
        content: what it says.
    """

    id: str
    split: str
    file: str
    row: int
    content: Content


def read_source(
    source: Source,
    *,
    split: str,
    labels: LabelWords,
    prefixes: Mapping[Path, str] | None = None,
    ledger: Ledger | None = None,
    reader: Reader | None = None,
) -> Iterator[Record | Rejection]:
    """The rows of a source, in file order; ids are not yet checked for uniqueness.

    Args:
        source: of a resolved recipe.
        split: "train", "valid", "test" or "ood".
        labels: words that stand for 0 and 1 in `pairs` files.
        prefixes: what ids of each file begin with, if the split has other sources (`id_prefixes`).
        ledger: takes the alterations; the caller deals with rejections.
        reader: of the task; None: that of the format.

    Raises:
        UserInputError: no file; or, after the rows of all others, files that are unreadable, empty or without
            a usable row, all of them named.
    """
    files = source_files(source)
    if not files:
        raise UserInputError(Problem(what="no file matches", where=f"data.{split}", got=source.path))
    prefixes = prefixes or id_prefixes(files)
    note = ledger.alter if ledger else ignore
    problems: list[Problem] = []
    for file, share in zip(files, shares_of(source, files, labels, problems), strict=True):
        if share == 0:
            continue
        rows = span_records(
            source,
            file,
            split=split,
            labels=labels,
            prefix=prefixes[file],
            limit=share,
            note=note,
            reader=reader,
        )
        try:
            yield from _usable(rows, file)
        except UserInputError as error:
            problems += error.problems
    if problems:
        raise UserInputError(*problems)


def span_records(
    source: Source,
    file: Path,
    *,
    split: str,
    labels: LabelWords,
    prefix: str,
    span: Span = WHOLE,
    limit: int | None = None,
    note: Note = ignore,
    reader: Reader | None = None,
) -> Iterator[Record | Rejection]:
    """The rows of a stretch of one file, with ids.

    Args:
        reader: of the task; None: that of the format.
        prefix: of the ids of rows without their own.
        limit: rows to take at most; None: all.

    Raises:
        UserInputError: the file is unusable as a whole.
    """
    for row in islice(_contents(source, file, labels, note, span, reader), limit):
        if isinstance(row, Rejection):
            yield row
            continue
        name = row.id or f"{prefix}:{row.row}"
        yield Record(id=name, split=split, file=str(file), row=row.row, content=row.content)


def read_unlabelled(
    file: Path, layouts: Sequence[Columns], *, labels: LabelWords, ledger: Ledger | None = None
) -> Iterator[Record | Rejection]:
    """The pairs of a TSV, CSV or JSONL file that need no labels (a label column is not looked at).

    Args:
        layouts: where the texts may stand; the first that the file's header names, else the first of all. A
            file of two columns, or of three whose third holds labels, may lack a header.
        labels: words that look like labels, besides 0 and 1.

    Raises:
        UserInputError: no such file, one of another kind, or without these columns.
    """
    if not file.is_file():
        raise UserInputError(Problem(what="no such file", where=str(file)))
    note = ledger.alter if ledger else ignore
    unlabelled = [layout.model_copy(update={"label": None}) for layout in layouts]
    layout = choose_columns(file, unlabelled)
    rows = pair_rows(file, layout, is_label=_label_test(labels), note=note)
    for row in _parsed(rows, file, parse_unlabelled, note):
        if isinstance(row, Rejection):
            yield row
        else:
            name = row.id or f"{file.stem}:{row.row}"
            yield Record(id=name, split="pairs", file=str(file), row=row.row, content=row.content)


def id_prefixes(files: Sequence[Path]) -> dict[Path, str]:
    """What the ids of each file's rows begin with: the stem, or as much of the path as tells them apart.

    >>> id_prefixes([Path("x/P17.train.json"), Path("x/P19.train.json.gz")]).values()
    dict_values(['P17.train', 'P19.train'])
    >>> id_prefixes([Path("x/a.jsonl"), Path("y/a.jsonl")]).values()
    dict_values(['x/a', 'y/a'])
    """
    choices = {file: _prefix_choices(file) for file in files}
    chosen = dict.fromkeys(choices, 0)
    while True:
        prefixes = {file: choices[file][chosen[file]] for file in choices}
        uses = Counter(prefixes.values())
        clashing = [
            file for file in choices if uses[prefixes[file]] > 1 and chosen[file] + 1 < len(choices[file])
        ]
        if not clashing:
            return prefixes
        for file in clashing:
            chosen[file] += 1


def _prefix_choices(file: Path) -> list[str]:
    """Stem, folder/stem, ..., and at last the whole path with its extension."""
    parts = (*file.parts[:-1], Path(file.name.removesuffix(".gz")).stem)
    choices = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)] + [str(file)]
    return [printable_path(choice) for choice in choices]


def shares_of(
    source: Source, files: Sequence[Path], labels: LabelWords, problems: list[Problem]
) -> list[int | None]:
    """Rows to take from each file, None for all; files that can't be counted are reported and get 0."""
    if source.limit is None or len(files) == 1:
        return [source.limit] * len(files)
    counts = []
    for file in files:
        try:
            rows = raw_rows(source, file, labels, ignore, WHOLE)
            counts.append(sum(1 for _ in islice(rows, source.limit)))
        except UserInputError as error:
            problems += error.problems
            counts.append(0)
    return list(even_shares(counts, source.limit))


def even_shares(counts: Sequence[int], total: int) -> list[int]:
    """Shares of `total` that differ by at most 1, except where a file has too few rows.

    >>> even_shares([10, 2, 10], 9)
    [4, 2, 3]
    """
    shares = [0] * len(counts)
    for position, i in enumerate(sorted(range(len(counts)), key=lambda i: (counts[i], -i))):
        shares[i] = min(counts[i], (total - sum(shares)) // (len(counts) - position))
    return shares


def _usable(rows: Iterator[Record | Rejection], file: Path) -> Iterator[Record | Rejection]:
    """The rows of one file; refuses it after the last if none was usable."""
    rejected: list[Rejection] = []
    num_records = 0
    for row in rows:
        if isinstance(row, Rejection):
            rejected = [*rejected, row][:3]
        else:
            num_records += 1
        yield row
    if not num_records:
        raise UserInputError(unusable_file(file, rejected))


def unusable_file(file: Path, rejected: Sequence[Rejection]) -> Problem:
    """What is said of a file without a usable row."""
    remedies = [
        REMEDIES[reason] for reason in dict.fromkeys(r.reason for r in rejected) if reason in REMEDIES
    ]
    return Problem(
        what="no usable row" if rejected else "the file holds no rows",
        where=printable_path(str(file)),
        got="\n      ".join(str(rejection) for rejection in rejected),
        remedy="; ".join(remedies),
    )


def raw_rows(
    source: Source, file: Path, labels: LabelWords, note: Note, span: Span
) -> Iterator[RawRow | Rejection]:
    """The rows of a stretch of one file, not yet understood: objects with named fields."""
    if is_arrow(file):
        rows = arrow_rows(source, file, span, note)
        return object_rows(file, source.columns, rows) if source.format == "pairs" else rows
    if source.format == "entityquestions":
        return json_list_rows(file, note)
    if source.format == "pairs":
        is_label = _label_test(labels)
        return pair_rows(file, source.columns, is_label=is_label, quotes=source.quotes, note=note, span=span)
    if source.format == "jsonl" and suffix_of(file) in (".csv", ".tsv"):
        return named_rows(file, source.quotes, note, span)
    return json_rows(file, note, span)


def _label_test(labels: LabelWords) -> Callable[[str], bool]:
    numbers = label_numbers(labels)
    return lambda text: read_label(text, numbers) is not None


def _contents(
    source: Source, file: Path, labels: LabelWords, note: Note, span: Span, reader: Reader | None
) -> Iterator[Parsed | Rejection]:
    rows, columns = raw_rows(source, file, labels, note, span), source.columns
    parse = (reader or READERS[source.format])(columns, labels)
    parsed = _parsed(rows, file, parse, note, columns.id)
    return _with_subjects(file, parsed) if source.format == "entityquestions" else parsed


def _parsed(
    rows: Iterator[RawRow | Rejection],
    file: Path,
    parse: Callable[[Fields], Content],
    note: Note,
    id_name: str | None = "id",
) -> Iterator[Parsed | Rejection]:
    """Apply `parse` to each row; what it refuses becomes a `Rejection`."""
    for row in rows:
        if isinstance(row, Rejection):
            yield row
            continue
        fields = Fields(row=row, file=str(file), note=note)
        try:
            yield Parsed(id=parse_id(fields, id_name), row=row.number, content=parse(fields))
        except OddRow as odd:
            yield _rejected(row, file, odd)
        except RecursionError:  # nested as deep as a JSON reader goes, deeper than repr() does
            yield _rejected(row, file, OddRow(Reason.WRONG_TYPE, "nested too deeply"))


def _rejected(row: RawRow, file: Path, odd: OddRow) -> Rejection:
    try:
        excerpt = odd.excerpt or json.dumps(row.value, ensure_ascii=False, default=str)
    except RecursionError:
        excerpt = f"a {type(row.value).__name__}, nested too deeply to be shown"
    return Rejection(
        file=str(file),
        row=row.number,
        reason=odd.reason,
        excerpt=printable(excerpt),
        detail=printable(odd.detail, DETAIL_CHARACTERS),
    )


def _with_subjects(file: Path, rows: Iterator[Parsed | Rejection]) -> Iterator[Parsed | Rejection]:
    """Add what EntityQuestions leaves out: relation (from the file's name), subjects (from the questions)."""
    relation = RELATION_IN_NAME.match(file.name)
    if relation is None:
        remedy = "name it like P17.train.json, or use format: facts"
        raise damaged(file, "the relation is read from the file's name, which has none", remedy=remedy)
    parsed = list(rows)
    facts = [fact for row in parsed if isinstance(row, Parsed) and (fact := fact_in(row.content))]
    subjects = _subjects(file, [fact.question or "" for fact in facts])
    found = zip(facts, subjects, strict=True)
    for row in parsed:
        if isinstance(row, Rejection):
            yield row
            continue
        fact, subject = next(found)
        yield replace(row, content=replace(fact, relation=relation[1], subject=subject))


def _subjects(file: Path, questions: list[str]) -> list[str]:
    try:
        return recover_subjects(questions) if questions else []
    except UserInputError as error:
        raise UserInputError(*(replace(problem, where=str(file)) for problem in error.problems)) from error
