"""Answers with a rationale: what was put together is taken apart again; anything else has no label."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.rationales import compose_answer, parse_answer, read_reply

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


WHY = "都问开门时间。"


@pytest.mark.parametrize(
    "said",
    [
        "{why}\n结论：相同",
        "{why}\n结论: 相同",
        "{why}\n结论：相同。",
        "{why}\n**结论：相同**",
        "{why}\n**结论：** 相同",
        "{why}\n### 结论：\n\n**相同**",
        "{why}\n结论：“相同”",
        "{why}\n结论是：「相同」",
        "{why}结论：相同",
        "{why}结论：相同（只是说法不一）",
        "结论不明时要再想：<think>结论：不同</think>{why}\n结论：相同",
        "{why}\n结论：相同\n总之，结论：相同",
        "{why}\nConclusion: 相同",
    ],
)
def test_a_teacher_may_write_its_conclusion_as_it_likes(said):
    assert read_reply(said.format(why=WHY), WORDS["zh"]) == (1, WHY)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "两句相同",
        WHY,
        f"{WHY}\n结论：相同\n再想想。\n结论：不同",
        f"{WHY}\n结论：相同还是不同？",
        f"{WHY}\n结论：相同 / 不同",
        f"{WHY}\n结论：也许",
        f"{WHY}\n结论：不太相同",
        f"{WHY}\n结论：相同\n改一下，结论：说不清",
    ],
)
def test_a_teacher_that_concludes_nothing_or_both_has_no_label(said):
    assert read_reply(said, WORDS["zh"])[0] is None


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("Both ask. Conclusion: Same.", 1),
        ("Both ask.\n*Conclusion:* **different**", 0),
        ("Both ask.\nConclusion: same, whatever the words", 1),
        ("Both ask.\nConclusion: not same", None),
        ("Both ask.\nConclusion: sameness", None),
    ],
)
def test_a_teacher_in_english(said, label):
    assert read_reply(said, WORDS["en"])[0] == label


@given(
    st.sampled_from(["zh", "en"]), st.sampled_from([0, 1]), st.text("ab ?.，。", min_size=1).filter(str.strip)
)
def test_a_teacher_that_keeps_to_our_form_is_read_like_our_model(language, label, rationale):
    text = compose_answer(WORDS[language][label], rationale, order="before", language=language)
    assert read_reply(text, WORDS[language])[0] == label
