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

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import xxhash
from numpy.typing import NDArray

from sftcore.data.contents import Chat, Completion, Content, Fact, Message, Pair
from sftcore.data.ledger import Reason
from sftcore.data.records import Record

# Unicode's format characters (Cf) that text is sprinkled with: soft hyphen, zero-width, direction, byte-order
UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)
SYSTEM_ROLES = ("system", "developer")  # what they say is no part of the question
Hashes = NDArray[np.uint64]
Render = Callable[[Content], str | None]  # the prompt that a held-out record becomes, where that is known


def normalised(text: str) -> str:
    r"""`text` as leaks are compared: NFKC, case-folded, runs of white space as one space, nothing unseen.

    >>> normalised("Where is  ＰＡ\u200bＲ\u00adＩＳ?\n")
    'where is paris?'
    """
    if text.isascii():
        return " ".join(text.lower().split())  # the same, at a third of the time
    seen = UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(seen.casefold().split())


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
            text = _joined(*_said(content.messages[: content.answers[-1]]))
    return text, text


def _said(turns: Sequence[Message]) -> list[str]:
    """What was said, the system's words aside: the same question after another system text is the same."""
    return [normalised(turn.content) for turn in turns if turn.role not in SYSTEM_ROLES]


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
            return _joined(*(text for turn in content.messages for text in _written(turn)))


def _written(turn: Message) -> tuple[str, str]:
    return (turn.role if turn.is_trained else f"{turn.role}, not trained"), turn.content


def _joined(*texts: str) -> str:
    return "\x1f".join(texts)  # the ASCII unit separator: not in any text after normalisation


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class RowHashes:
    """What R rows are compared by; all are (R,) uint64 but for `labels` and E earlier turns.

    Args:
        items: of what is asked (`item_texts`, first).
        questions: of a fact's own question (`item_texts`, second).
        texts: of the whole sample (`sample_text`).
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
    item, question = item_texts(content)
    hashed = _hash(item)
    label = content.label if isinstance(content, Pair) else -1
    return hashed, hashed if question is item else _hash(question), _hash(sample_text(content)), label


def hash_earlier(content: Content) -> list[int]:
    """Hashes of what comes before each assistant turn of a chat but the last, as `item_texts` has it."""
    if not isinstance(content, Chat):
        return []
    turns, answers = content.messages, content.answers[:-1]
    texts = _said(turns[: answers[-1]]) if answers else []
    num_said = [0, *accumulate(turn.role not in SYSTEM_ROLES for turn in turns)]
    return [_hash(_joined(*texts[: num_said[i]])) for i in answers]


def _unrendered(_: Content) -> None:
    """The `Render` of a caller that compares items only."""


def hash_asked(held_out: Iterable[Record], render: Render = _unrendered) -> Hashes:
    """Sorted hashes of all that held-out records ask, also as the prompts that `render` makes of them."""
    hashes: set[int] = set()
    for record in held_out:
        hashes.update(map(_hash, item_texts(record.content)))
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
