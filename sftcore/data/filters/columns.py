"""What records are compared by: numbers that stand for their texts, a column each.

In: training and held-out records. Out: `Columns`, one line a training record.
Invariant: texts that read alike (Unicode NFKC, case-folded, white space collapsed, unseen characters and
system turns aside, a pair in either order) have the same number.
Trade-off: texts are compared by 64-bit hashes in numpy arrays: 33 bytes a record instead of its text (330 MB
for 10 million; 16 more for each earlier assistant turn of a chat), and one false match in 2^65 / n^2
(n = 10 million: 1 in 370,000).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftcore.data.ledger import Reason
from sftcore.data.records import Record
from sftcore.knowledge.containment import AliasTable
from sftcore.tasks.kinds.content import Content, normalised

Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]
REASONS = tuple(Reason)
Render = Callable[[Content], str | None]  # the prompt that a held-out record becomes, where that is known


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What R rows are compared by; all are (R,) uint64 but for marks and E earlier turns.

    Args:
        items: of what is asked (`Content.asked`, first).
        questions: of a fact's own question (`Content.asked`, second).
        texts: of the whole sample (`Content.written`).
        labels: (R,) int8, of pairs; -1 for others.
        earlier: (E,) uint64, of what comes before each assistant turn but the last of each chat.
        earlier_rows: (E,) int64, the rows that these stand in.
        asked: sorted, of all that held-out records ask (`hash_asked`).
        trivial: (R,) int8, why a fact says nothing of memory: position in `REASONS`, or -1; empty where that
            is not asked for.
    """

    items: Hashes
    questions: Hashes
    texts: Hashes
    labels: NDArray[np.int8]
    earlier: Hashes
    earlier_rows: NDArray[np.int64]
    asked: Hashes
    trivial: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))


def hash_id(id: str) -> int:
    """64 bits that stand for a record's id."""
    return _hash(id)


def hash_row(content: Content) -> tuple[int, int, int, int]:
    """One row of `Columns`."""
    item, question = content.asked()
    hashed = _hash(item)
    same = question is item
    return hashed, hashed if same else _hash(question), _hash(content.written()), content.gold


def hash_earlier(content: Content) -> list[int]:
    """Hashes of what comes before each assistant turn of a chat but the last, as `Content.asked` has it."""
    return [_hash(text) for text in content.earlier()]


def hash_asked(held_out: Iterable[Record], render: Render | None = None) -> Hashes:
    """Sorted hashes of all that held-out records ask, also as the prompts that `render` makes of them."""
    hashes: set[int] = set()
    for record in held_out:
        hashes.update(map(_hash, record.content.asked()))
        if render and (prompt := render(record.content)) is not None:
            hashes.add(_hash(normalised(prompt)))
    return np.unique(_hashes(array("Q", hashes)))


def columns_of(records: Sequence[Record], asked: Hashes, *, finds_trivial: bool = False) -> Columns:
    """The columns of records in memory.

    Args:
        finds_trivial: whether `trivial` is filled.
    """
    hashed = [array(kind) for kind in "QQQb"]
    earlier, earlier_rows = array("Q"), array("q")
    for row, record in enumerate(records):
        for column, value in zip(hashed, hash_row(record.content), strict=True):
            column.append(value)
        found = hash_earlier(record.content)
        earlier.extend(found)
        earlier_rows.extend([row] * len(found))
    items, questions, texts, labels = hashed
    return Columns(
        items=_hashes(items),
        questions=_hashes(questions),
        texts=_hashes(texts),
        labels=np.array(labels, np.int8),
        earlier=_hashes(earlier),
        earlier_rows=np.array(earlier_rows, np.int64),
        asked=asked,
        trivial=_trivial(records) if finds_trivial else np.empty(0, np.int8),
    )


def _trivial(records: Sequence[Record]) -> NDArray[np.int8]:
    aliases = AliasTable.load()
    reasons = [record.content.why_trivial(aliases) for record in records]
    return np.array([-1 if reason is None else REASONS.index(reason) for reason in reasons], np.int8)


def is_in(hashes: Hashes, ordered: Hashes) -> Mask:
    """Like np.isin, whose sort would need 5 times the memory of `hashes`."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    places = np.searchsorted(ordered, hashes)
    places[places == len(ordered)] = 0
    return ordered[places] == hashes


def _hashes(values: array[int]) -> Hashes:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def repeated(hashes: Hashes) -> Mask:
    """Marks each copy after the first.

    >>> repeated(np.array([7, 8, 7, 7], np.uint64)).tolist()
    [False, False, True, True]
    """
    copies = np.ones(len(hashes), bool)
    copies[np.unique(hashes, return_index=True)[1]] = False
    return copies
