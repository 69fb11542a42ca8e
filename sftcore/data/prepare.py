"""`sftcore prepare`: from a recipe to its token store, made once per content.

In: a recipe and a tokenizer. Out: an open `TokenStore` in .cache/stores/FINGERPRINT; also the records
themselves, for probe and evaluation.
Invariant: num_rows_read = num_samples + num_rejected + num_not_selected; two stores with one fingerprint hold
the same samples, since it covers every byte that decides them.
Trade-off: training files are read twice, once to judge (duplicates, contradictions and leaks need the whole
set) and once to write, so RAM holds 150 bytes a row, never the texts (EntityQuestions: 3 of 17 s for 176,560
rows on two cores).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftcore.config import Recipe, Source
from sftcore.data.hygiene import judge
from sftcore.data.ledger import PROMPTING, READING, Alteration, Change, Ledger, Reason, Rejection, printable
from sftcore.data.prompts import Prompter, PromptOptions, Sample, question_patterns
from sftcore.data.records import Record, id_prefixes, read_source
from sftcore.data.store import TokenStore, write_store
from sftcore.data.tokens import Tokenizer, load_tokenizer, tokenizer_identity
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of, folder_lock, sha256_of_file
from sftcore.log import log, progress
from sftcore.recipe import source_files

__all__ = ["load_items", "load_records", "load_tokenizer", "prepare_store", "store_fingerprint"]

CODE_VERSION = 1  # raise it when the same inputs give other samples
STORES = Path(".cache/stores")
HELD_OUT = ("test", "ood")
FORMATS = {
    "qa": ("entityquestions", "facts", "jsonl"),
    "matching": ("pairs",),
    "chat": ("jsonl",),
}


def load_records(recipe: Recipe, split: str, ledger: Ledger) -> list[Record]:
    """All usable records of a split; for "train" after hygiene against "test" and "ood".

    Raises:
        UserInputError: unusable files, formats that the task can't use, too many rejected rows.
    """
    return list(_stream_records(recipe, split, ledger))


def load_items(recipe: Recipe, split: str, ledger: Ledger | None = None) -> list[Record]:
    """The held-out records that are probed and evaluated; empty if the recipe has no such source.

    Args:
        split: "test" or "ood".
    """
    assert split in HELD_OUT
    return load_records(recipe, split, ledger or Ledger())


def prepare_store(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    only_ids: Collection[str] | None = None,
    cache_root: Path = STORES,
) -> TokenStore:
    """The token store of the recipe's training data, written unless it is there already.

    Processes that ask for the same store at once wait for the first.

    Args:
        only_ids: train on these records only (selected facts); None: on all.
        cache_root: folder of stores.

    Raises:
        UserInputError: data, template or tokenizer can't be used; the ledger is then beside the stores.
        MissingEnvironmentError: disk full, read-only or not permitted.
    """
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)
    fingerprint = store_fingerprint(recipe, tokenizer, only_ids=only_ids)
    folder = cache_root / fingerprint
    if store := _reusable(folder, fingerprint):
        return store
    with folder_lock(cache_root / ".locks" / fingerprint, purpose="preparing data", wait=True):
        if store := _reusable(folder, fingerprint):
            return store
        if folder.exists():
            log.warning("%s is damaged: writing it again", folder)
            shutil.rmtree(folder)
        ledger = Ledger()
        try:
            samples = _samples(recipe, prompter, ledger, only_ids)
            write_store(folder, samples, fingerprint=fingerprint, ledger=ledger)
        except UserInputError as error:
            raise _with_ledger(error, ledger, cache_root / f"{fingerprint}.ledger.jsonl") from error
    store = TokenStore.open(folder, fingerprint)
    _report(store)
    return store


def store_fingerprint(
    recipe: Recipe, tokenizer: Tokenizer, *, only_ids: Collection[str] | None = None
) -> str:
    """Hash of everything that decides the samples: file contents, template, tokenizer, options, code."""
    data = recipe.data
    return fingerprint_of(
        {
            "code": CODE_VERSION,
            "sources": {split: _sources_identity(recipe, split) for split in ("train", *HELD_OUT)},
            "prompts": PromptOptions.of(recipe).identity(),
            "patterns": question_patterns() if recipe.task == "qa" else None,
            "deduplicate": data.deduplicate,
            "max_reject_fraction": data.max_reject_fraction,
            "tokenizer": tokenizer_identity(tokenizer),
            "only_ids": None if only_ids is None else sorted(set(only_ids)),
        }
    )


def _sources_identity(recipe: Recipe, split: str) -> list[dict[str, Any]]:
    prefixes = _split_prefixes(recipe, split)
    return [
        {
            "format": source.format,
            "limit": source.limit,
            "columns": source.columns.model_dump(),
            "files": [[prefixes[file], sha256_of_file(file)] for file in source_files(source)],
        }
        for source in _sources(recipe, split)
    ]


def _sources(recipe: Recipe, split: str) -> list[Source]:
    return {"train": recipe.data.train, "test": recipe.data.test, "ood": recipe.data.ood}[split]


def _split_prefixes(recipe: Recipe, split: str) -> dict[Path, str]:
    return id_prefixes([file for source in _sources(recipe, split) for file in source_files(source)])


def _stream_records(recipe: Recipe, split: str, ledger: Ledger) -> Iterator[Record]:
    _check_formats(recipe)
    rows = ledger.take(_read_split(recipe, split, ledger))
    yield from _clean(recipe, rows, ledger) if split == "train" else rows
    limit = recipe.data.max_reject_fraction
    ledger.check(limit, reasons=READING, num_rows=ledger.num_rows_read)


def _check_formats(recipe: Recipe) -> None:
    problems = [
        Problem(
            what=f"task {recipe.task} can't use format {source.format}",
            where=f"data.{split}.{number}.format",
            allowed=", ".join(FORMATS[recipe.task]),
        )
        for split in ("train", *HELD_OUT)
        for number, source in enumerate(_sources(recipe, split))
        if source.format not in FORMATS[recipe.task]
    ]
    if problems:
        raise UserInputError(*problems)


def _read_split(recipe: Recipe, split: str, ledger: Ledger | None) -> Iterator[Record | Rejection]:
    """Rows of all sources of a split; of records with the same id the first stays."""
    prefixes = _split_prefixes(recipe, split)
    seen: set[str] = set()
    for source in _sources(recipe, split):
        rows = read_source(
            source, split=split, labels=recipe.matching.labels, prefixes=prefixes, ledger=ledger
        )
        for row in rows:
            if isinstance(row, Record) and row.id in seen:
                yield _dropped(row, Reason.DUPLICATE_ID)
                continue
            if isinstance(row, Record):
                seen.add(row.id)
            yield row


def _dropped(record: Record, reason: Reason) -> Rejection:
    return Rejection(file=record.file, row=record.row, reason=reason, excerpt=printable(record.id))


def _records_of(recipe: Recipe, *splits: str) -> Iterator[Record]:
    for split in splits:
        yield from (row for row in _read_split(recipe, split, None) if isinstance(row, Record))


def _clean(recipe: Recipe, records: Iterable[Record], ledger: Ledger) -> Iterator[Record]:
    """Training records without leaks, contradictions and (if asked for) duplicates."""
    verdicts = judge(_records_of(recipe, "train"), _records_of(recipe, *HELD_OUT))
    with progress("reading training rows", len(verdicts)) as advance:
        for record, verdict in zip(records, verdicts, strict=True):
            advance(1)
            if verdict is Reason.DUPLICATE and not recipe.data.deduplicate:
                ledger.alter(Alteration(file=record.file, row=record.row, change=Change.DUPLICATE_KEPT))
                verdict = None
            if verdict is None:
                yield record
            else:
                ledger.reject(_dropped(record, verdict))


def _samples(
    recipe: Recipe, prompter: Prompter, ledger: Ledger, only_ids: Collection[str] | None
) -> Iterator[Sample]:
    """All training samples; at the end, checks of the whole that may refuse it."""
    wanted = None if only_ids is None else set(only_ids)
    num_offered = 0

    def selected() -> Iterator[Record]:
        nonlocal num_offered
        for record in _stream_records(recipe, "train", ledger):
            if wanted is not None and record.id not in wanted:
                ledger.num_not_selected += 1
                continue
            if wanted is not None:
                wanted.discard(record.id)
            num_offered += 1
            yield record

    yield from prompter.samples(selected(), ledger)
    if wanted:
        raise UserInputError(_not_found(wanted))
    _check_prompting(recipe, ledger, num_offered)


def _not_found(ids: Collection[str]) -> Problem:
    return Problem(
        what=f"{len(ids)} of the selected records are not among the usable training records",
        where="data.train",
        got=", ".join(sorted(ids)[:3]),
        remedy="the data has changed since they were selected: run `sftcore probe` again",
    )


def _check_prompting(recipe: Recipe, ledger: Ledger, num_offered: int) -> None:
    data = recipe.data
    num_overlength = ledger.rejected_by_reason[Reason.OVERLENGTH]
    if data.overlength == "error" and num_overlength:
        problem = ledger.problem(frozenset({Reason.OVERLENGTH}), num_rows=num_offered, max_fraction=0)
        remedy = "raise data.max_length, or set data.overlength: reject or trim_prompt"
        raise UserInputError(replace(problem, remedy=remedy))
    ledger.check(data.max_reject_fraction, reasons=PROMPTING, num_rows=num_offered)


def _reusable(folder: Path, fingerprint: str) -> TokenStore | None:
    """The store in `folder` if it is whole."""
    if not folder.is_dir():
        return None
    try:
        store = TokenStore.open(folder, fingerprint)
        store.verify()
    except UserInputError as error:
        log.warning("%s", error)
        return None
    return store


def _with_ledger(error: UserInputError, ledger: Ledger, path: Path) -> UserInputError:
    """`error`, with the place where all rejected rows are listed, if there are any."""
    if not ledger.num_rejected:
        return error
    ledger.write(path)
    listed = Problem(what=f"all {ledger.num_rejected} dropped rows are listed there", where=str(path))
    return UserInputError(*error.problems, listed)


def _report(store: TokenStore) -> None:
    counts = store.manifest
    log.info(
        "store %s: %d rows read, %d samples, %d rejected; %d tokens, %d of them trained (%.1f %%)",
        store.fingerprint,
        counts["num_rows_read"],
        counts["num_samples"],
        counts["num_rejected"],
        counts["num_tokens"],
        counts["num_trained_tokens"],
        100 * counts["num_trained_tokens"] / counts["num_tokens"],
    )
    for kind in ("rejected_by_reason", "altered_by_reason"):
        if counts[kind]:
            log.info("  %s: %s", kind, ", ".join(f"{reason} {n}" for reason, n in counts[kind].items()))
