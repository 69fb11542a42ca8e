"""`sftcore prepare`: from a recipe to its token store, made once per content.

In: a recipe and a tokenizer. Out: an open `TokenStore` in .cache/stores/FINGERPRINT.
Invariant: num_rows_read = num_samples + num_rejected + num_not_selected; two stores with one fingerprint hold
the same samples, since it covers every byte that decides them.
Trade-off: finished parts of a prepare that was interrupted, met a file that it could not read, or found too
many odd rows stay in FINGERPRINT.parts until somebody asks for the same store again (at most its size); only
what is missing is then made, and another `max_reject_fraction` is the same store.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftcore.config import DataSettings, Recipe
from sftcore.data.digests import KnownDigests
from sftcore.data.filters import Hashes
from sftcore.data.filters.columns import REASONS, hash_id
from sftcore.data.fingerprint import Digest, Wanted, as_wanted, store_fingerprint
from sftcore.data.ledger import PROMPTING, READING, Ledger, Reason
from sftcore.data.merge import (
    FIRST_REASON,
    Outcomes,
    Part,
    account,
    decide,
    files_without_records,
    read_parts,
    write_merge,
)
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.splits import (
    check_formats,
    hash_held_out,
    load_records,
    split_prefixes,
)
from sftcore.data.store import KEPT, TokenStore
from sftcore.data.tokens import Tokenizer
from sftcore.data.units import Unit, cut_sources, share_of_job
from sftcore.data.workers import Workshop, default_num_workers, write_parts
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import folder_lock, read_jsonl, sync_entry
from sftcore.log import log
from sftcore.shares import Share

__all__ = ["load_records", "prepare_shard", "prepare_store", "store_fingerprint"]

STORES = Path(".cache/stores")


class _NeverAStore(UserInputError):
    """Only other data or another recipe helps: these parts are of no more use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One store to be made.

    Args:
        recipe: resolved.
        prompter: of the recipe.
        fingerprint: of the store.
        only_ids: records to train on; None: all.
        cache_root: folder of stores.
    """

    recipe: Recipe
    prompter: Prompter
    fingerprint: str
    only_ids: Wanted | None
    cache_root: Path

    @property
    def folder(self) -> Path:
        """Where the finished store goes."""
        return self.cache_root / self.fingerprint

    @property
    def parts(self) -> Path:
        """Where its parts are until then."""
        return self.cache_root / f"{self.fingerprint}.parts"

    def units(self) -> list[Unit]:
        """The work."""
        return cut_sources(self.recipe.data.train, self.recipe.matching.labels)

    def workshop(self) -> Workshop:
        """What each worker needs."""
        prefixes = split_prefixes(self.recipe.data, "train")
        return Workshop(
            recipe=self.recipe,
            prompter=self.prompter,
            prefixes=prefixes,
            wanted=self.only_ids,
            folder=self.parts,
        )


def prepare_store(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    only_ids: Collection[str] | None = None,
    cache_root: Path = STORES,
    num_workers: int | None = None,
    merge_only: bool = False,
) -> TokenStore:
    """The token store of the recipe's training data, written unless it is there already.

    Processes that ask for the same store at once wait for the first.

    Args:
        only_ids: train on these records only (selected facts); a mapping gives the answers to train, where
            they are not the record's own; None: on all.
        cache_root: folder of stores.
        num_workers: processes; None: one a core.
        merge_only: refuse to make parts; other jobs have made them (`prepare_shard`).

    Raises:
        UserInputError: data, template or tokenizer can't be used; the ledger is then next to the stores.
        MissingEnvironmentError: disk full, read-only or not permitted.
    """
    with _remembered(cache_root) as known:
        order = _order(recipe, tokenizer, only_ids, cache_root, known.sha256)
        if store := _reusable(order, known.sha256):
            return _allowed(recipe.data, store)
        lock = cache_root / ".locks" / order.fingerprint
        with folder_lock(lock, purpose="preparing data", wait=True) as is_alone:
            if store := _reusable(order, known.sha256):
                return _allowed(recipe.data, store)
            began = time.time_ns()
            if order.folder.exists():
                log.warning("%s is damaged: writing it again", order.folder)
                shutil.rmtree(order.folder)
            _build(order, num_workers or default_num_workers(), is_alone=is_alone, merge_only=merge_only)
        store = TokenStore.open(order.folder, order.fingerprint)
        files = store.described_files()
        known.learn({file: about["sha256"] for file, about in files.items()}, since=began)
    return _allowed(recipe.data, store)


def prepare_shard(
    recipe: Recipe,
    tokenizer: Tokenizer,
    share: Share,
    *,
    only_ids: Collection[str] | None = None,
    cache_root: Path = STORES,
    num_workers: int | None = None,
) -> tuple[int, int]:
    """Make the parts that are one job's share, e.g. in a Slurm array.

    When all jobs are done, `prepare_store` finds their parts and only writes the manifest.

    Returns:
        number of parts that are this job's, and of all.

    Raises:
        UserInputError: data, template or tokenizer can't be used.
        MissingEnvironmentError: disk full, read-only or not permitted.
    """
    with _remembered(cache_root) as known:
        order = _order(recipe, tokenizer, only_ids, cache_root, known.sha256)
        units = order.units()
        mine = share_of_job(units, share)
        if _reusable(order, known.sha256):
            return len(mine), len(units)
    locks = cache_root / ".locks"
    with (
        folder_lock(locks / order.fingerprint, purpose="preparing data", wait=True, shared=True),
        folder_lock(
            locks / f"{order.fingerprint}.{share.name}", purpose="preparing data", wait=True
        ) as is_alone,
    ):
        workshop = order.workshop()
        if is_alone:
            workshop.clean(mine)
        problems = write_parts(workshop, mine, num_workers=num_workers or default_num_workers())
    if problems:
        raise UserInputError(*problems)
    return len(mine), len(units)


@contextmanager
def _remembered(cache_root: Path) -> Iterator[KnownDigests]:
    """Checksums next to the stores; what was learned is kept."""
    known = KnownDigests(cache_root / ".digests.json")
    yield known
    known.save()


def _order(
    recipe: Recipe,
    tokenizer: Tokenizer,
    only_ids: Collection[str] | None,
    cache_root: Path,
    digest: Digest,
) -> _Order:
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)
    check_formats(recipe.task, recipe.data)
    return _Order(
        recipe=recipe,
        prompter=prompter,
        fingerprint=store_fingerprint(recipe, tokenizer, only_ids=only_ids, digest=digest),
        only_ids=as_wanted(only_ids),
        cache_root=cache_root,
    )


def _reusable(order: _Order, digest: Digest) -> TokenStore | None:
    """The finished store if it is whole."""
    if not order.folder.is_dir():
        return None
    try:
        store = TokenStore.open(order.folder, order.fingerprint)
        store.verify(digest)
    except UserInputError as error:
        log.warning("%s", error)
        return None
    return store


def _allowed(data: DataSettings, store: TokenStore) -> TokenStore:
    """`store`, unless this recipe allows fewer dropped rows than the one that it was made for."""
    dropped = store.manifest["rejected_by_reason"]
    if not any(dropped.get(reason) for reason in READING | PROMPTING):
        return store
    path, ledger = store.folder / "ledger.jsonl", Ledger()
    ledger.absorb(read_jsonl(path), num_rows_read=store.manifest["num_rows_read"], altered={})
    try:
        _check_limits(data, ledger, len(store))
    except UserInputError as error:
        raise UserInputError(*error.problems, _listed(ledger, path)) from error
    return store


def _build(order: _Order, num_workers: int, *, is_alone: bool, merge_only: bool) -> None:
    """Make what is missing, compare, and give the store its name."""
    workshop, units = order.workshop(), order.units()
    if merge_only and (missing := [unit for unit in units if not workshop.is_done(unit)]):
        raise UserInputError(_not_all_done(order.parts, missing, units))
    if is_alone:
        workshop.clean(units)
    try:
        _finish(order, workshop, units, num_workers)
        _give_name(order)
    except _NeverAStore:
        shutil.rmtree(order.parts, ignore_errors=True)
        raise
    except UserInputError:
        log.info("finished parts are kept in %s (fixed data will not need them)", order.parts)
        raise
    except FileNotFoundError:  # without locks, another process may have renamed it under our hands
        if not order.folder.is_dir():
            raise
        shutil.rmtree(order.parts, ignore_errors=True)


def _give_name(order: _Order) -> None:
    """Rename the finished parts; a store that another process finished meanwhile (without locks) stays."""
    try:
        os.replace(order.parts, order.folder)
    except OSError:
        if not order.folder.is_dir():
            raise
        shutil.rmtree(order.parts, ignore_errors=True)
    sync_entry(order.cache_root)


def _finish(order: _Order, workshop: Workshop, units: Sequence[Unit], num_workers: int) -> None:
    """Make the missing parts and merge all of them; every unusable file is named."""
    problems = write_parts(workshop, units, num_workers=num_workers)
    try:
        asked = hash_held_out(order.recipe)
    except UserInputError as error:
        problems += error.problems
    done = [unit for unit in units if workshop.is_done(unit)]
    if not problems and len(done) < len(units):
        raise FileNotFoundError(order.parts)
    parts = read_parts(order.parts, done)
    problems += files_without_records(parts, done)
    if problems:
        raise UserInputError(*problems)
    _merge(order, parts, asked)


def _not_all_done(folder: Path, missing: Sequence[Unit], units: Sequence[Unit]) -> Problem:
    numbers = ", ".join(str(unit.number) for unit in missing[:10]) + (", ..." if len(missing) > 10 else "")
    return Problem(
        what=f"{len(missing)} of {len(units)} parts are missing: {numbers}",
        where=str(folder),
        remedy="wait for all `sftcore prepare --shard i/N` jobs, run those that failed again,"
        " or leave out --merge",
    )


def _merge(order: _Order, parts: Sequence[Part], asked: Hashes) -> None:
    """Compare all records, check the account, write ledger and manifest."""
    data, only = order.recipe.data, order.only_ids
    wanted = None if only is None else np.array([hash_id(id) for id in only], np.uint64)
    outcomes, copies = decide(parts, asked, wanted, deduplicate=data.deduplicate)
    ledger = account(parts, outcomes, copies)
    num_samples = int(np.count_nonzero(outcomes == KEPT))
    try:
        _check_limits(data, ledger, num_samples)
        if only is not None and (missing := _not_offered(parts, outcomes, only)):
            raise _NeverAStore(_not_found(missing))
        if not num_samples:
            why = ledger.problem(frozenset(Reason), num_rows=ledger.num_rows_read, max_fraction=1).got
            raise _NeverAStore(Problem(what="no row became a training sample", where="data.train", got=why))
    except UserInputError as error:
        path = order.cache_root / f"{order.fingerprint}.ledger.jsonl"
        raise _with_ledger(error, ledger, path) from error
    names = source_names(data)
    write_merge(order.parts, parts, outcomes, ledger, fingerprint=order.fingerprint, sources=names)


def source_names(data: DataSettings) -> list[str]:
    """A short name for each training source: its file's name or pattern, with its number if that is taken."""
    names = [Path(source.path).name for source in data.train]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def _is_offered(outcomes: Outcomes) -> Any:
    """Records that reached the prompts: samples, and those that the prompts refused."""
    return np.isin(outcomes, [KEPT, *(FIRST_REASON + REASONS.index(reason) for reason in PROMPTING)])


def _not_offered(parts: Sequence[Part], outcomes: Outcomes, only: Collection[str]) -> list[str]:
    ids = np.concatenate([part.column("id_hash") for part in parts])[_is_offered(outcomes)]
    found = set(ids.tolist())
    return [id for id in only if hash_id(id) not in found]


def _not_found(ids: Collection[str]) -> Problem:
    return Problem(
        what=f"{len(ids)} of the selected records are not among the usable training records",
        where="data.train",
        got=", ".join(sorted(ids)[:3]),
        remedy="the data has changed since they were selected: run `sftcore probe` again",
    )


def _check_limits(data: DataSettings, ledger: Ledger, num_samples: int) -> None:
    """Refuse data of which more rows were dropped than the recipe allows."""
    rejected = ledger.rejected_by_reason
    ledger.check(data.max_reject_fraction, reasons=READING, num_rows=ledger.num_rows_read)
    num_offered = num_samples + sum(rejected[reason] for reason in PROMPTING)
    if data.overlength == "error" and rejected[Reason.OVERLENGTH]:
        problem = ledger.problem(frozenset({Reason.OVERLENGTH}), num_rows=num_offered, max_fraction=0)
        remedy = "raise data.max_length, or set data.overlength: reject or trim_prompt"
        raise UserInputError(replace(problem, remedy=remedy))
    ledger.check(data.max_reject_fraction, reasons=PROMPTING, num_rows=num_offered)


def _with_ledger(error: UserInputError, ledger: Ledger, path: Path) -> UserInputError:
    """`error`, with the place where all rejected rows are listed, if there are any."""
    if not ledger.num_rejected:
        return error
    ledger.write(path)
    return type(error)(*error.problems, _listed(ledger, path))


def _listed(ledger: Ledger, path: Path) -> Problem:
    return Problem(what=f"all {ledger.num_rejected} dropped rows are listed there", where=str(path))
