"""Leaks, contradictions and duplicates, each counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.filters import judge
from sftcore.data.ledger import Reason
from sftcore.data.records import Chat, Completion, Fact, Message, Pair, Record
from sftcore.tasks.kinds.content import normalised

LEAK, CONTRADICTORY, DUPLICATE = Reason.LEAK, Reason.CONTRADICTORY_LABEL, Reason.DUPLICATE


def records(*contents):
    return [Record(id=str(i), split="s", file="f", row=i, content=c) for i, c in enumerate(contents, 1)]


def fact(relation, subject, answer, question=None):
    return Fact(relation=relation, subject=subject, answers=(answer,), question=question)


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return Chat(messages=tuple(Message(role=r, content=c) for r, c in zip(roles, texts, strict=False)))


def test_normalised_text_hides_case_width_and_space():
    assert normalised(" Where\u00a0is\tＰＡＲＩＳ  STRASSE?") == normalised("where is paris straße?")
    assert normalised("Paris") != normalised("París")


@pytest.mark.parametrize(
    ("train", "held_out", "leaks"),
    [
        (fact("P1", "Ann", "x", "Where IS Ann?"), fact("P2", "Bob", "y", "where is  ann?"), True),
        (fact("P1", "Ann", "x", "Where is Ann?"), fact("P1", "ann", "y"), True),
        (fact("P1", "Ann", "x"), fact("P1", "Ann", "y", "Other words?"), True),
        (fact("P1", "Ann", "x"), fact("P2", "Ann", "x"), False),
        (Pair(a="x", b="Y", label=0), Pair(a="y", b="x", label=1), True),
        (Pair(a="x", b="y", label=0), Pair(a="x", b="z", label=0), False),
        (Completion(prompt="Q ", completion="a"), Completion(prompt="q", completion="b"), True),
        (Completion(prompt="Q", completion="a"), Completion(prompt="R", completion="a"), False),
        (Completion(prompt="Where is Ann?", completion="a"), fact("P1", "Ann", "x", "Where is Ann?"), True),
        (chat("a", "b", "c", "d"), chat("A", "B", "c", "other"), True),
        (chat("a", "b", "c", "d"), chat("A", "other"), True),  # its first answer is trained, too
        (chat("a", "b", "c", "d", "e", "f"), chat("a", "b", "c", "other"), True),
        (chat("a", "b"), chat("a", "b", "c", "d"), False),
        (chat("a", "b", "c", "d"), chat("b", "c"), False),
    ],
)
def test_leaks(train, held_out, leaks):
    assert judge(records(train), records(held_out)) == [LEAK if leaks else None]


def test_all_copies_of_a_contradictory_pair_go():
    pairs = [("x", "y", 1), ("x", "z", 1), ("Y", "x", 0), ("x", "y", 1), ("x", "z", 1)]
    verdicts = judge(records(*(Pair(a=a, b=b, label=n) for a, b, n in pairs)), [])
    assert verdicts == [CONTRADICTORY, None, CONTRADICTORY, CONTRADICTORY, DUPLICATE]


def test_of_exact_duplicates_the_first_stays():
    facts = [
        fact("P1", "Ann", a, q) for a, q in (("x", "Q?"), ("x", "Q?"), ("y", "Q?"), ("x", "q?"), ("x", None))
    ]
    assert judge(records(*facts), []) == [None, DUPLICATE, None, None, None]
    chats = [chat("a", "b"), chat("a", "b"), chat("a", "c")]
    assert judge(records(*chats), []) == [None, DUPLICATE, None]
    completions = [Completion(prompt="p", completion=c) for c in ("1", "1", "2")]
    assert judge(records(*completions), []) == [None, DUPLICATE, None]


def test_a_leak_outranks_the_other_reasons():
    pairs = records(Pair(a="x", b="y", label=1), Pair(a="x", b="y", label=0), Pair(a="x", b="y", label=0))
    assert judge(pairs, pairs[:1]) == [LEAK] * 3


def test_nothing_in_nothing_out():
    assert judge([], []) == []


PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("ABc"), st.integers(0, 1)), max_size=12)


@given(PAIRS, PAIRS)
def test_verdicts_equal_those_of_plain_sets(train, held_out):
    def key(pair):
        return frozenset((pair[0].lower(), pair[1].lower()))

    expected = []
    for i, pair in enumerate(train):
        if key(pair) in map(key, held_out):
            expected.append(LEAK)
        elif len({p[2] for p in train if key(p) == key(pair)}) == 2:
            expected.append(CONTRADICTORY)
        else:
            expected.append(DUPLICATE if pair in train[:i] else None)
    make = lambda rows: records(*(Pair(a=a, b=b, label=n) for a, b, n in rows))  # noqa: E731
    assert judge(make(train), make(held_out)) == expected


def test_hashes_are_64_bits():
    many = records(*(Completion(prompt=str(i), completion="x") for i in range(2000)))
    assert judge(many, many[::2]) == [LEAK, None] * 1000
    assert np.dtype(np.uint64).itemsize == 8


def test_unseen_characters_hide_no_leak():
    for unseen in "\u200b\u00ad\u2060\ufeff\u200e":
        train = Completion(prompt=f"Where{unseen} is An{unseen}n?", completion="a")
        assert judge(records(train), records(Completion(prompt="where is Ann?", completion="b"))) == [LEAK]


def test_a_system_turn_hides_no_leak():
    system = Message(role="system", content="Be kind.")
    plain = chat("a", "b", "c", "d")
    said = Chat(messages=(system, *plain.messages))
    later = Chat(messages=(*plain.messages[:2], system, *plain.messages[2:]))
    other = chat("a", "b", "c", "other")
    for train in (said, later):
        assert judge(records(train), records(other)) == judge(records(other), records(train)) == [LEAK]
    assert judge(records(said), records(chat("a", "x"))) == [LEAK]  # its first answer
    assert judge(records(said), records(chat("b", "x"))) == [None]


def test_a_turn_that_is_not_trained_makes_another_sample_and_no_leak():
    plain = chat("a", "b", "c", "d")
    turns = [plain.messages[0], Message(role="assistant", content="b", is_trained=False), *plain.messages[2:]]
    masked = Chat(messages=tuple(turns))
    assert judge(records(plain, masked, plain), []) == [None, None, DUPLICATE]
    assert judge(records(plain, masked), records(chat("a", "x"))) == [LEAK, None]
