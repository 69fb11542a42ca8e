"""Subjects: recovered from wording shared by all questions, never torn inside a word."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.data.subjects import recover_subjects
from sftcore.errors import UserInputError

SHAPES = st.sampled_from(
    [("Where was ", " born?"), ("Who is ", "'s child?"), ("What is the capital of ", "?"), ("", " is where?")]
)
WORDS = st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=0x24F), min_size=1, max_size=6)
SUBJECTS = st.lists(
    st.lists(WORDS, min_size=1, max_size=3).map(" ".join), min_size=2, max_size=8, unique_by=lambda s: s
)


@given(SHAPES, SUBJECTS)
def test_subjects_come_back(shape: tuple[str, str], subjects: list[str]) -> None:
    start, end = shape
    first, last = {s.split()[0] for s in subjects}, {s.split()[-1] for s in subjects}
    if len(first) == 1 or len(last) == 1:  # a word that all subjects share can't be told from the wording
        subjects = [*subjects, "Ödön 5x"]
    assert recover_subjects([f"{start}{subject}{end}" for subject in subjects]) == subjects


def test_letters_that_all_subjects_share_are_kept() -> None:
    subjects = ["Paris", "Pécs", "Perros"]
    questions = [f"Where is {subject} located?" for subject in subjects]
    assert os.path.commonprefix(questions) == "Where is P"  # the trap is there
    assert recover_subjects(questions) == subjects


def test_words_that_all_subjects_share_count_as_wording() -> None:
    assert recover_subjects(["Who founded Alpha Inc.?", "Who founded Beta Inc.?"]) == ["Alpha", "Beta"]


@pytest.mark.parametrize(
    "subjects", [["Sunn O)))", "Chill (drug)"], ['"Heroes"', '"Low"'], ["Wham!", "Help!"], ["A&M", "B&M"]]
)
def test_marks_at_the_edges_stay_with_the_subject(subjects: list[str]) -> None:
    assert recover_subjects([f"Who founded {subject}?" for subject in subjects]) == subjects


def test_chinese_needs_no_spaces() -> None:
    assert recover_subjects(["谁创立了阿里巴巴？", "谁创立了百度？"]) == ["阿里巴巴", "百度"]


def test_repeated_questions_are_fine() -> None:
    assert recover_subjects(["Who owns X1?", "Who owns Y2?", "Who owns X1?"]) == ["X1", "Y2", "X1"]


def test_questions_without_shared_wording_are_refused() -> None:
    with pytest.raises(UserInputError, match="share no wording"):
        recover_subjects(["Where was Ada born?", "Who owns Dogpile?"])
    with pytest.raises(UserInputError, match="share no wording"):
        recover_subjects([])


@pytest.mark.parametrize(
    "questions", [["Who owns Dogpile?"], ["Who owns Dogpile?"] * 2, ["is a b c", "is a b b c", "is b c"]]
)
def test_an_empty_subject_is_refused(questions: list[str]) -> None:
    with pytest.raises(UserInputError, match="no subject is left between"):
        recover_subjects(questions)


DATA = Path(os.environ.get("SFTCORE_TEST_DATA", "/nonexistent")) / "entityquestions"


@pytest.mark.skipif(not DATA.is_dir(), reason="set SFTCORE_TEST_DATA")
def test_real_relations_have_one_wording_in_all_their_splits() -> None:
    relations = sorted(file.name.split(".")[0] for file in (DATA / "train").glob("P*.json"))
    assert len(relations) == 24
    for relation in relations:
        wordings = set()
        for split in ("train", "dev", "test"):
            text = (DATA / split / f"{relation}.{split}.json").read_text(encoding="utf-8")
            questions = [row["question"] for row in json.loads(text)]
            for question, subject in zip(questions, recover_subjects(questions), strict=True):
                assert subject == subject.strip()
                wordings.add(question.replace(f" {subject}", " {}", 1))
        assert len(wordings) == 1
