"""Answers with a rationale: what was put together is taken apart again; anything else has no label."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.rationales import compose_answer, parse_answer

WORDS = {"zh": ("不同", "相同"), "en": ("different", "same")}


@given(
    st.sampled_from(["zh", "en"]),
    st.sampled_from(["none", "before", "after"]),
    st.sampled_from([0, 1]),
    st.text(min_size=1),
)
def test_a_composed_answer_gives_its_label_back(language, order, label, rationale):
    words = WORDS[language]
    text = compose_answer(words[label], rationale, order=order, language=language)
    assert parse_answer(text, words, order=order, language=language) == label
    assert (rationale.strip() == "" or order == "none") or " ".join(rationale.split()) in text


@pytest.mark.parametrize(
    ("text", "order", "label"),
    [
        ("相同", "none", 1),
        (" 相同\n", "none", 1),
        ("相同。", "none", None),
        ("相同相同", "none", None),
        ("", "none", None),
        ("", "after", None),
        ("不同\n理由：一个问时间，一个问地点", "after", 0),
        ("两句相同", "after", None),
        ("一个相同，一个不同。\n结论：不同", "before", 0),
        ("结论：相同\n再想想。\n结论：不同", "before", 0),
        ("两句意思相同", "before", None),
        ("分析\n结论：也许", "before", None),
    ],
)
def test_only_the_trained_form_has_a_label(text, order, label):
    assert parse_answer(text, WORDS["zh"], order=order, language="zh") == label
