"""Parts -> store: which records are samples, the account of all rows, the manifest.

In: the parts of all units, the hashes of what the held-out sets ask. Out: outcome.bin (one byte a record),
the ledger, manifest.json last; no token and no text is copied.
Invariant: num_rows_read = num_samples + num_rejected + num_not_selected; of several reasons to drop a record
the first of these counts: id given twice, leak, contradiction, duplicate, not selected, refused by prompts.
Trade-off: comparing all records holds hashes, never texts: 98 bytes a row, measured as resident memory
between 100,000 and a million rows (benchmarks/results/prepare.json), and 16 more for prompts and answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftcore.data.filters import COMPARED, Columns, Hashes, filter_columns
from sftcore.data.filters.columns import REASONS, repeated
from sftcore.data.ledger import (
    DETAIL_CHARACTERS,
    LISTED_ALTERATIONS_PER_KIND,
    Alteration,
    Change,
    Ledger,
    Reason,
    Rejection,
    printable,
)
from sftcore.data.parts import CHANGES, NO_REFUSAL, describe_file, part_name
from sftcore.data.records import unusable_file
from sftcore.data.store import FORMAT_VERSION, KEPT, STORE_FILES, numbers, open_rows
from sftcore.data.units import Unit
from sftcore.errors import Problem
from sftcore.fsio import atomic_file, read_json, read_jsonl, write_json

PACKAGES = ("numpy", "pyarrow", "tokenizers", "transformers")
NOT_SELECTED = 1
FIRST_REASON = 2  # outcome of a record dropped for REASONS[i]: FIRST_REASON + i
Outcomes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A finished part, as part.json describes it."""

    folder: Path
    about: dict[str, Any]

    def rows(self) -> pa.Table:
        """Its records (`ROWS_SCHEMA`), memory-mapped."""
        return open_rows(self.folder)

    def column(self, name: str) -> NDArray[Any]:
        """A numeric column of its records."""
        return numbers(self.rows(), name)


def read_parts(folder: Path, units: Sequence[Unit]) -> list[Part]:
    """The parts of all units, in their order; all have to be there."""
    folders = [folder / part_name(unit.number) for unit in units]
    return [Part(folder=f, about=read_json(f / "part.json")) for f in folders]


def files_without_records(parts: Sequence[Part], units: Sequence[Unit]) -> list[Problem]:
    """One problem for each file of which no row is usable."""
    of_file: dict[Path, list[Part]] = {}
    for part, unit in zip(parts, units, strict=True):
        of_file.setdefault(unit.file, []).append(part)
    empty = {f: ps for f, ps in of_file.items() if not any(part.about["num_records"] for part in ps)}
    return [unusable_file(file, _first_rejections(ps)) for file, ps in empty.items()]


def _first_rejections(parts: Sequence[Part]) -> list[Rejection]:
    entries = (entry for part in parts for entry in read_jsonl(part.folder / "ledger.jsonl"))
    rejected = [entry for entry in entries if entry.pop("kind") == "rejected"]
    return [Rejection(**entry | {"reason": Reason(entry["reason"])}) for entry in rejected[:3]]


def decide(
    parts: Sequence[Part], asked: Hashes, wanted: Hashes | None, *, deduplicate: bool
) -> tuple[Outcomes, NDArray[np.bool_]]:
    """What becomes of each record of the parts, and of each sample where it gives several.

    Args:
        asked: sorted, of the held-out records (`hash_asked`).
        wanted: of the selected ids; None: all.

    Returns:
        KEPT, NOT_SELECTED, or FIRST_REASON + a reason's position; and which records are kept copies.
    """
    ids, begins = _joined(parts, "id_hash", np.uint64), _begins(parts)
    outcomes = np.full(len(ids), KEPT, np.uint8)
    outcomes[_refused(parts)] = _refusals(parts)
    if wanted is not None:
        outcomes[~np.isin(ids, wanted)] = NOT_SELECTED
    again = begins.copy()
    again[begins] = repeated(ids[begins])
    del ids
    first = begins & ~again
    places = np.flatnonzero(first)
    earlier, earlier_rows = _earlier(parts)
    is_first = first[earlier_rows]
    columns = Columns(
        items=_joined(parts, "item_hash", np.uint64)[first],
        questions=_joined(parts, "question_hash", np.uint64)[first],
        texts=_joined(parts, "text_hash", np.uint64)[first],
        labels=_joined(parts, "label", np.int8)[first],
        earlier=earlier[is_first],
        earlier_rows=np.searchsorted(places, earlier_rows[is_first]),
        asked=asked,
    )
    copies = np.zeros(len(outcomes), bool)
    masks = filter_columns(columns, COMPARED)
    if not deduplicate:
        copies[places[masks.pop(Reason.DUPLICATE)]] = True
    for reason, mask in reversed(masks.items()):
        outcomes[places[mask]] = _code(reason)
    outcomes[again] = _code(Reason.DUPLICATE_ID)
    outcomes = outcomes[np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))]
    return outcomes, copies & (outcomes == KEPT)


def _begins(parts: Sequence[Part]) -> NDArray[np.bool_]:
    """Which lines begin a record: those of another row than the line before."""
    rows = [part.column("row") for part in parts]
    return np.concatenate([np.empty(0, bool), *(np.diff(found, prepend=-1) != 0 for found in rows)])


def _joined(parts: Sequence[Part], name: str, dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *(part.column(name) for part in parts)])


def _earlier(parts: Sequence[Part]) -> tuple[Hashes, NDArray[np.int64]]:
    """The earlier hashes of all chats, and the row that each belongs to."""
    hashes: list[Any] = [np.empty(0, np.uint64)]
    rows = [np.empty(0, np.int64)]
    start = 0
    for chunk in (chunk for part in parts for chunk in part.rows()["earlier_hashes"].chunks):
        if len(values := chunk.flatten()):
            counts = np.diff(np.from_dlpack(chunk.offsets))
            hashes.append(np.from_dlpack(values))
            rows.append(np.repeat(np.arange(start, start + len(chunk)), counts))
        start += len(chunk)
    return np.concatenate(hashes), np.concatenate(rows)


def _refused(parts: Sequence[Part]) -> NDArray[np.bool_]:
    return _joined(parts, "refusal", np.int8) != NO_REFUSAL


def _refusals(parts: Sequence[Part]) -> Outcomes:
    refusals = _joined(parts, "refusal", np.int8)
    return (refusals[refusals != NO_REFUSAL] + FIRST_REASON).astype(np.uint8)


def _code(reason: Reason) -> int:
    return FIRST_REASON + REASONS.index(reason)


def account(parts: Sequence[Part], outcomes: Outcomes, copies: NDArray[np.bool_]) -> Ledger:
    """The ledger of the whole: what the parts noted while reading, and every dropped or altered record."""
    ledger = Ledger()
    start, others, begins = 0, _otherwise_answered(parts, outcomes), _begins(parts)
    for part in parts:
        rows, about = part.rows(), part.about
        ledger.absorb(
            read_jsonl(part.folder / "ledger.jsonl"),
            num_rows_read=about["num_rows_read"],
            altered=about["altered_by_reason"],
        )
        here = outcomes[start : start + len(rows)]
        for rejection in _rejections(rows, about["file"], here, begins[start : start + len(rows)]):
            ledger.reject(rejection)
        _note(ledger, rows, about["file"], copies[start : start + len(rows)], Change.DUPLICATE_KEPT)
        _note(ledger, rows, about["file"], others[start : start + len(rows)], Change.OTHER_ANSWER)
        changes = numbers(rows, "changes")
        for bit, change in enumerate(CHANGES):
            _note(ledger, rows, about["file"], (changes >> bit & 1).astype(bool) & (here == KEPT), change)
        _count_markers(ledger, rows, (changes >> CHANGES.index(Change.MARKER_IN_TEXT) & 1) & (here == KEPT))
        start += len(rows)
    ledger.num_not_selected = int(np.count_nonzero((outcomes == NOT_SELECTED) & begins))
    return ledger


def _otherwise_answered(parts: Sequence[Part], outcomes: Outcomes) -> NDArray[np.bool_]:
    """Samples whose prompt another one has, with another answer (pairs aside, whose labels are compared)."""
    is_sample = (outcomes == KEPT) & (_joined(parts, "label", np.int8) < 0)
    prompts = _joined(parts, "prompt_hash", np.uint64)[is_sample]
    marks = np.zeros(len(outcomes), bool)
    marks[is_sample] = answered_twice(prompts, _joined(parts, "sample_hash", np.uint64)[is_sample])
    return marks


def answered_twice(prompts: Hashes, samples: Hashes) -> NDArray[np.bool_]:
    """Which of some samples share their prompt with a different one.

    >>> answered_twice(np.array([5, 7, 5, 7], np.uint64), np.array([1, 2, 3, 2], np.uint64)).tolist()
    [True, False, True, False]
    """
    if not len(prompts):
        return np.zeros(0, bool)
    order = np.lexsort((samples, prompts))
    prompts, samples = prompts[order], samples[order]
    starts = np.concatenate([[True], prompts[1:] != prompts[:-1]])
    differs = np.concatenate([[False], (samples[1:] != samples[:-1])]) & ~starts
    group = np.cumsum(starts) - 1
    marks = np.zeros(len(prompts), bool)
    marks[order] = np.bincount(group, weights=differs).astype(bool)[group]
    return marks


def _rejections(
    rows: pa.Table, file: str, outcomes: Outcomes, begins: NDArray[np.bool_]
) -> Iterator[Rejection]:
    for i in np.flatnonzero((outcomes >= FIRST_REASON) & begins).tolist():
        reason = REASONS[outcomes[i] - FIRST_REASON]
        is_refusal = rows["refusal"][i].as_py() != NO_REFUSAL
        yield Rejection(
            file=file,
            row=rows["row"][i].as_py(),
            reason=reason,
            excerpt=printable(rows["id"][i].as_py()),
            detail=printable(rows["detail"][i].as_py(), DETAIL_CHARACTERS) if is_refusal else "",
        )


def _count_markers(ledger: Ledger, rows: pa.Table, mask: NDArray[np.int_]) -> None:
    """Count each of the template's markers by its name."""
    for i in np.flatnonzero(mask).tolist():
        for marker in rows["detail"][i].as_py().split("\n"):
            ledger.altered_by_reason[f"{Change.MARKER_IN_TEXT} {marker}"] += 1


def _note(ledger: Ledger, rows: pa.Table, file: str, mask: NDArray[np.bool_], change: Change) -> None:
    """Count a change of all records in `mask`; the ledger lists the first ones."""
    if not (places := np.flatnonzero(mask).tolist()):
        return
    for i in places[:LISTED_ALTERATIONS_PER_KIND]:
        ledger.alter(Alteration(file=file, row=rows["row"][i].as_py(), change=change))
    ledger.altered_by_reason[change] += len(places[LISTED_ALTERATIONS_PER_KIND:])


def write_merge(
    folder: Path,
    parts: Sequence[Part],
    outcomes: Outcomes,
    ledger: Ledger,
    *,
    fingerprint: str,
    sources: Sequence[str],
) -> dict[str, Any]:
    """Write outcome.bin, ledger.jsonl and, last, manifest.json next to the parts; returns the manifest.

    Args:
        sources: name of each training source.
    """
    with atomic_file(folder / "outcome.bin", "wb") as handle:
        handle.write(outcomes.tobytes())
    ledger.write(folder / "ledger.jsonl")
    per_source = _source_totals(parts, outcomes, sources)
    keys = ("num_samples", "num_tokens", "num_trained_tokens")
    totals = {key: sum(source[key] for source in per_source) for key in keys}
    manifest = {
        "num_rows_read": ledger.num_rows_read,
        "num_samples": totals["num_samples"],
        "num_rejected": ledger.num_rejected,
        "num_not_selected": ledger.num_not_selected,
        "rejected_by_reason": dict(sorted(ledger.rejected_by_reason.items())),
        "altered_by_reason": dict(sorted(ledger.altered_by_reason.items())),
        "num_tokens": totals["num_tokens"],
        "num_trained_tokens": totals["num_trained_tokens"],
        "sources": per_source,
        "fingerprint": fingerprint,
        "format_version": FORMAT_VERSION,
        "created_with": {name: version(name) for name in PACKAGES},
        "files": {name: describe_file(folder / name) for name in STORE_FILES},
        "parts": [{"name": part.folder.name, **part.about} for part in parts],
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _source_totals(parts: Sequence[Part], outcomes: Outcomes, names: Sequence[str]) -> list[dict[str, Any]]:
    zeros = {"num_samples": 0, "num_tokens": 0, "num_trained_tokens": 0}
    totals: list[dict[str, Any]] = [{"name": name, **zeros} for name in names]
    start = 0
    for part in parts:
        rows, total = part.rows(), totals[part.about["source"]]
        kept = outcomes[start : start + len(rows)] == KEPT
        total["num_samples"] += int(np.count_nonzero(kept))
        total["num_tokens"] += int(numbers(rows, "num_tokens")[kept].sum(dtype=np.int64))
        total["num_trained_tokens"] += int(numbers(rows, "num_trained")[kept].sum(dtype=np.int64))
        start += len(rows)
    return totals
