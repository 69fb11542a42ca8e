"""What a training set must not hold: items of the test sets, and pairs that carry both labels.

In: training and held-out records. Out: per training record, the reason to drop it, or None.
Invariant: a training item that reads like a held-out one (Unicode NFKC, case-folded, white space collapsed,
a pair in either order) is dropped, whatever its answer; of a pair with both labels no copy stays.
Trade-off: texts are compared by 64-bit hashes in numpy arrays: 33 bytes a record instead of its text (330 MB
for 10 million), and one false match in 2^65 / n^2 (n = 10 million: 1 in 370,000).
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftcore.data.contents import Chat, Completion, Content, Fact, Pair
from sftcore.data.ledger import Reason
from sftcore.data.records import Record

Hashes = NDArray[np.uint64]


def normalised(text: str) -> str:
    r"""`text` as leaks are compared: NFKC, case-folded, runs of white space as one space.

    >>> normalised("Where is  ＰＡＲＩＳ?\n")
    'where is paris?'
    """
    if text.isascii():
        return " ".join(text.lower().split())  # the same, at a third of the time
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def item_texts(content: Content) -> tuple[str, str]:
    """What is asked, without the answer; a fact is known by its question and by relation + subject."""
    match content:
        case Fact():
            triple = _joined(normalised(content.relation), normalised(content.subject))
            return triple, triple if content.question is None else normalised(content.question)
        case Pair():
            text = _joined(*sorted((normalised(content.a), normalised(content.b))))
        case Completion():
            text = normalised(content.prompt)
        case Chat():
            turns = content.messages
            last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
            text = _joined(*(normalised(turn.content) for turn in turns[:last]))
    return text, text


def sample_text(content: Content) -> str:
    """What a sample would hold: equal texts are exact duplicates of prompt and trained answer."""
    match content:
        case Fact():
            return _joined(content.question or content.relation + content.subject, content.answers[0])
        case Pair():
            return _joined(content.a, content.b, str(content.label), content.rationale or "")
        case Completion():
            return _joined(content.prompt, content.completion)
        case Chat():
            return _joined(*(text for turn in content.messages for text in (turn.role, turn.content)))


def _joined(*texts: str) -> str:
    return "\x1f".join(texts)  # the ASCII unit separator: not in any text after normalisation


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHashes:
    """What R rows are compared by; all but `labels` are (R,) uint64.

    Args:
        items: of what is asked (`item_texts`, first).
        questions: of a fact's own question (`item_texts`, second).
        texts: of the whole sample (`sample_text`).
        labels: (R,) int8, of pairs; -1 for others.
    """

    items: Hashes
    questions: Hashes
    texts: Hashes
    labels: NDArray[np.int8]


def hash_id(id: str) -> int:
    """64 bits that stand for a record's id."""
    return _hash(id)


def hash_row(content: Content) -> tuple[int, int, int, int]:
    """One row of `RowHashes`."""
    item, question = item_texts(content)
    hashed = _hash(item)
    label = content.label if isinstance(content, Pair) else -1
    return hashed, hashed if question is item else _hash(question), _hash(sample_text(content)), label


def hash_asked(held_out: Iterable[Record]) -> Hashes:
    """Sorted hashes of all that held-out records ask."""
    return np.unique(
        _hashes(array("Q", {_hash(text) for record in held_out for text in item_texts(record.content)}))
    )


def judge(train: Iterable[Record], held_out: Iterable[Record]) -> list[Reason | None]:
    """Why each training record should go: LEAK before CONTRADICTORY_LABEL before DUPLICATE, or None.

    Of exact duplicates the first copy stays.
    """
    items, questions, texts, labels = array("Q"), array("Q"), array("Q"), array("b")
    for record in train:
        for column, value in zip((items, questions, texts, labels), hash_row(record.content), strict=True):
            column.append(value)
    rows = RowHashes(
        items=_hashes(items),
        questions=_hashes(questions),
        texts=_hashes(texts),
        labels=np.array(labels, np.int8),
    )
    verdicts: list[Reason | None] = [None] * len(items)
    for reason, mask in judge_hashes(rows, hash_asked(held_out)):
        for i in np.flatnonzero(mask).tolist():
            verdicts[i] = reason
    return verdicts


def judge_hashes(rows: RowHashes, asked: Hashes) -> Iterator[tuple[Reason, NDArray[np.bool_]]]:
    """Each reason with the rows that it holds for, (R,) bool; a later reason overrides an earlier one."""
    yield Reason.DUPLICATE, repeated(rows.texts)
    yield Reason.CONTRADICTORY_LABEL, _contradicted(rows.items, rows.labels)
    yield Reason.LEAK, _is_in(rows.items, asked) | _is_in(rows.questions, asked)


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
