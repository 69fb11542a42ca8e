"""Which facts are asked, and each prompt once."""

from __future__ import annotations

import pytest

from sftcore.data.contents import Fact
from sftcore.data.ledger import Reason
from sftcore.data.records import Record
from sftcore.errors import UserInputError
from sftcore.knowledge.containment import AliasTable
from sftcore.knowledge.questions import distinct_questions, make_trials


def record(content, row=1) -> Record:
    return Record(id=f"f{row}", split="train", file="x.jsonl", row=row, content=content)


def fact(subject: str, *answers: str, relation: str = "P131") -> Fact:
    return Fact(relation=relation, subject=subject, answers=answers)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (fact("Wakefield Cathedral", "Wakefield"), Reason.ANSWER_IN_SUBJECT),
        (fact("Battle of Asiago", "Rome", "Asiago"), Reason.ANSWER_IN_SUBJECT),
        (fact("USA Today", "United States of America", relation="P17"), Reason.ANSWER_IN_SUBJECT),  # an alias
        (fact("北京大学", "北京"), Reason.ANSWER_IN_SUBJECT),
        (fact("Roman Polanski", "Oman"), None),  # not a word of its own
        (fact("Malcolm", "X"), Reason.SHORT_ANSWER),
        (fact("Rowling", "J."), Reason.SHORT_ANSWER),
        (fact("Rowling", "J.K."), None),
        (fact("Malcolm", "Lansing", "X"), Reason.SHORT_ANSWER),  # any answer counts, so one is enough
        (fact("Peru", "Lima"), None),
    ],
)
def test_facts_that_any_model_would_seem_to_know(content, reason):
    assert content.why_trivial(AliasTable.load()) == reason


def test_each_prompt_is_asked_once():
    rows = [record(fact("Peru", "Lima")), record(fact("Chile", "x y")), record(fact("Peru", "Cusco"))]
    trials = make_trials(rows, 2)
    questions = distinct_questions(trials)
    assert [question.trials for question in questions] == [(0, 4), (1, 5), (2,), (3,)]
    assert all(trials[number].prompt == q.prompt for q in questions for number in q.trials)


def test_a_relation_without_wording_is_named_with_its_row():
    fact = Fact(relation="guild", subject="Ann", answers=("x",))
    record = Record(id="a", split="train", file="facts.jsonl", row=7, content=fact)
    with pytest.raises(UserInputError, match="facts.jsonl:7: no wording is known for .* 'guild'"):
        make_trials([record], 1)
