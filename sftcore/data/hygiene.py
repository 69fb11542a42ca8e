"""What a training set must not hold: items of the test sets, and pairs that carry both labels.

In: training and held-out records. Out: per training record, the reason to drop it, or None.
Invariant: a training item that reads like a held-out one (Unicode NFKC, case-folded, white space collapsed,
unseen characters and system turns aside, a pair in either order) is dropped, whatever its answer; so is a
chat if any of its trained turns answers what a held-out chat asks last; of a pair with both labels no copy
stays.
Trade-off: texts are compared by 64-bit hashes in numpy arrays: 33 bytes a record instead of its text (330 MB
for 10 million; 16 more for each earlier assistant turn of a chat), and one false match in 2^65 / n^2
(n = 10 million: 1 in 370,000).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftcore.data.ledger import Reason
from sftcore.data.records import Record
from sftcore.tasks.kinds.content import Content, normalised

Hashes = NDArray[np.uint64]
Render = Callable[[Content], str | None]  # the prompt that a held-out record becomes, where that is known


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHashes:
    """What R rows are compared by; all are (R,) uint64 but for `labels` and E earlier turns.

    Args:
        items: of what is asked (`Content.asked`, first).
        questions: of a fact's own question (`Content.asked`, second).
        texts: of the whole sample (`Content.written`).
        labels: (R,) int8, of pairs; -1 for others.
        earlier: (E,) uint64, of what comes before each assistant turn but the last of each chat.
        earlier_rows: (E,) int64, the rows that these stand in.
    """

    items: Hashes
    questions: Hashes
    texts: Hashes
    labels: NDArray[np.int8]
    earlier: Hashes
    earlier_rows: NDArray[np.int64]


def hash_id(id: str) -> int:
    """64 bits that stand for a record's id."""
    return _hash(id)


def hash_row(content: Content) -> tuple[int, int, int, int]:
    """One row of `RowHashes`."""
    item, question = content.asked()
    hashed = _hash(item)
    same = question is item
    return hashed, hashed if same else _hash(question), _hash(content.written()), content.gold


def hash_earlier(content: Content) -> list[int]:
    """Hashes of what comes before each assistant turn of a chat but the last, as `Content.asked` has it."""
    return [_hash(text) for text in content.earlier()]


def _unrendered(_: Content) -> None:
    """The `Render` of a caller that compares items only."""


def hash_asked(held_out: Iterable[Record], render: Render = _unrendered) -> Hashes:
    """Sorted hashes of all that held-out records ask, also as the prompts that `render` makes of them."""
    hashes: set[int] = set()
    for record in held_out:
        hashes.update(map(_hash, record.content.asked()))
        if (prompt := render(record.content)) is not None:
            hashes.add(_hash(normalised(prompt)))
    return np.unique(_hashes(array("Q", hashes)))


def judge(
    train: Iterable[Record], held_out: Iterable[Record], render: Render = _unrendered
) -> list[Reason | None]:
    """Why each training record should go: LEAK before CONTRADICTORY_LABEL before DUPLICATE, or None.

    Of exact duplicates the first copy stays.
    """
    items, questions, texts, labels = array("Q"), array("Q"), array("Q"), array("b")
    earlier, earlier_rows = array("Q"), array("q")
    for row, record in enumerate(train):
        for column, value in zip((items, questions, texts, labels), hash_row(record.content), strict=True):
            column.append(value)
        found = hash_earlier(record.content)
        earlier.extend(found)
        earlier_rows.extend([row] * len(found))
    rows = RowHashes(
        items=_hashes(items),
        questions=_hashes(questions),
        texts=_hashes(texts),
        labels=np.array(labels, np.int8),
        earlier=_hashes(earlier),
        earlier_rows=np.array(earlier_rows, np.int64),
    )
    verdicts: list[Reason | None] = [None] * len(items)
    for reason, mask in judge_hashes(rows, hash_asked(held_out, render)):
        for i in np.flatnonzero(mask).tolist():
            verdicts[i] = reason
    return verdicts


def judge_hashes(rows: RowHashes, asked: Hashes) -> Iterator[tuple[Reason, NDArray[np.bool_]]]:
    """Each reason with the rows that it holds for, (R,) bool; a later reason overrides an earlier one."""
    yield Reason.DUPLICATE, repeated(rows.texts)
    yield Reason.CONTRADICTORY_LABEL, _contradicted(rows.items, rows.labels)
    leaks = _is_in(rows.items, asked) | _is_in(rows.questions, asked)
    leaks[rows.earlier_rows[_is_in(rows.earlier, asked)]] = True
    yield Reason.LEAK, leaks


def _is_in(hashes: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    """Like np.isin, whose sort would need 5 times the memory of `hashes`."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    places = np.searchsorted(ordered, hashes)
    places[places == len(ordered)] = 0
    return ordered[places] == hashes


def _hashes(values: array[int]) -> Hashes:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def repeated(hashes: Hashes) -> NDArray[np.bool_]:
    """Marks each copy after the first.

    >>> repeated(np.array([7, 8, 7, 7], np.uint64)).tolist()
    [False, False, True, True]
    """
    copies = np.ones(len(hashes), bool)
    copies[np.unique(hashes, return_index=True)[1]] = False
    return copies


def _contradicted(items: Hashes, labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Marks pairs that occur with label 0 and with label 1."""
    same, different = np.unique(items[labels == 1]), np.unique(items[labels == 0])
    return _is_in(items, same) & _is_in(items, different) & (labels >= 0)
