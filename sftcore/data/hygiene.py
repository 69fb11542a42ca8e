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
from collections.abc import Iterable

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
            return _joined(content.a, content.b, str(content.label))
        case Completion():
            return _joined(content.prompt, content.completion)
        case Chat():
            return _joined(*(text for turn in content.messages for text in (turn.role, turn.content)))


def _joined(*texts: str) -> str:
    return "\x1f".join(texts)  # the ASCII unit separator: not in any text after normalisation


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def judge(train: Iterable[Record], held_out: Iterable[Record]) -> list[Reason | None]:
    """Why each training record should go: LEAK before CONTRADICTORY_LABEL before DUPLICATE, or None.

    Of exact duplicates the first copy stays.
    """
    items, questions, samples = array("Q"), array("Q"), array("Q")
    labels = array("b")
    for record in train:
        item, question = item_texts(record.content)
        items.append(_hash(item))
        questions.append(_hash(question))
        samples.append(_hash(sample_text(record.content)))
        labels.append(record.content.label if isinstance(record.content, Pair) else -1)
    asked = array("Q", {_hash(text) for record in held_out for text in item_texts(record.content)})
    verdicts: list[Reason | None] = [None] * len(items)
    for mask, reason in (
        (_repeated(_hashes(samples)), Reason.DUPLICATE),
        (_contradicted(_hashes(items), np.asarray(labels, np.int8)), Reason.CONTRADICTORY_LABEL),
        (np.isin(_hashes(items), _hashes(asked)) | np.isin(_hashes(questions), _hashes(asked)), Reason.LEAK),
    ):
        for i in np.flatnonzero(mask).tolist():
            verdicts[i] = reason
    return verdicts


def _hashes(values: array[int]) -> Hashes:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def _repeated(samples: Hashes) -> NDArray[np.bool_]:
    """Marks each copy after the first."""
    repeated = np.ones(len(samples), bool)
    repeated[np.unique(samples, return_index=True)[1]] = False
    return repeated


def _contradicted(items: Hashes, labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Marks pairs that occur with label 0 and with label 1."""
    return np.isin(items, items[labels == 0]) & np.isin(items, items[labels == 1]) & (labels >= 0)
