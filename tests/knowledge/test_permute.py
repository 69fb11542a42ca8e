"""The control's answers: the same, each as often, on other facts wherever that can be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.knowledge.levels import FactLevel
from sftcore.knowledge.permute import num_kept, permuted_answers


def facts(**relations: list[str]) -> list[FactLevel]:
    return [
        FactLevel(id=f"{name}-{i}", relation=name, subject=f"s{i}", answers=(answer, "x"), hits=1, trials=4)
        for name, answers in relations.items()
        for i, answer in enumerate(answers)
    ]


RELATION = st.lists(st.sampled_from("ABCD"), min_size=2, max_size=12).filter(
    lambda found: len(set(found)) > 1
)


@given(RELATION, RELATION, st.integers(0, 9))
def test_answers_stay_as_they_are_in_number_and_leave_their_facts_where_they_can(one, other, draw):
    before = facts(P17=one, P36=other)
    after = permuted_answers(before, seed=17, draw=draw)
    assert [fact.id for fact in after] == [fact.id for fact in before]
    for relation in ("P17", "P36"):
        old, new = ([f for f in found if f.relation == relation] for found in (before, after))
        assert Counter(f.answers for f in old) == Counter(f.answers for f in new)
        most, n = max(Counter(f.answers[0] for f in old).values()), len(old)
        assert num_kept(old, new) == max(0, 2 * most - n)  # the fewest that any exchange keeps
    assert after == permuted_answers(before, seed=17, draw=draw)


def test_draws_exchange_otherwise():
    before = facts(P17=list("ABCDEFGH"))
    found = {tuple(f.answers for f in permuted_answers(before, seed=17, draw=draw)) for draw in range(5)}
    assert len(found) == 5


def test_a_relation_with_one_answer_is_named():
    with pytest.raises(UserInputError, match="nothing to permute") as refused:
        permuted_answers(facts(P17=["A", "B"], P36=["C"], P20=["D", "D"]), seed=17, draw=0)
    assert "P36, P20" in str(refused.value)
