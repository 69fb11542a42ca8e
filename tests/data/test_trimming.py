"""Cutting prompts: what goes, and what never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.contents import Chat, Completion, Fact, Message, Pair
from sftcore.data.trimming import cut_left

CHAT = Chat(
    messages=(
        Message(role="system", content="be kind"),
        Message(role="user", content="hello"),
        Message(role="assistant", content="answer"),
    )
)


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), st.data())
def test_cutting_takes_the_left_of_the_longest(texts, data):
    num_cut = data.draw(st.integers(0, sum(map(len, texts)) - len(texts)))
    cut = cut_left(texts, num_cut)
    assert sum(map(len, texts)) - sum(map(len, cut)) == num_cut
    assert all(text.endswith(rest) and rest for text, rest in zip(texts, cut, strict=True))
    shortened = [rest for text, rest in zip(texts, cut, strict=True) if rest != text]
    assert all(len(rest) >= max(map(len, cut)) - 1 for rest in shortened)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (Fact(relation="P1", subject="s", answers=("a",), question="q?"), ["q?"]),
        (Pair(a="x", b="y", label=1), ["x", "y"]),
        (Completion(prompt="p", completion="c"), ["p"]),
        (CHAT, ["be kind", "hello"]),
    ],
)
def test_prompt_texts_can_be_replaced_and_answers_stay(content, texts):
    assert content.cuttable() == texts
    changed = content.with_cuttable([text.upper() for text in texts])
    assert changed.cuttable() == [text.upper() for text in texts]
    assert changed.with_cuttable(texts) == content
