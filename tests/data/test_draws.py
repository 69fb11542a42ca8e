"""Draws of pairs: balanced, nested, seeded."""

from __future__ import annotations

import pytest

from sftcore.data.contents import Pair
from sftcore.data.draws import draw_pairs
from sftcore.errors import UserInputError


@pytest.fixture
def records(record_of):
    """30 pairs of label 0, 10 of label 1."""
    return [record_of(Pair(a=f"a{i}", b="b", label=int(i % 4 == 0)), id=f"r{i}") for i in range(40)]


def labels(drawn):
    return [record.content.label for record in drawn]


def test_classes_come_in_equal_numbers_and_in_the_order_of_the_data(records):
    drawn = draw_pairs(records, 15, balance="label", seed=1, draw=0)
    assert (labels(drawn).count(0), labels(drawn).count(1)) == (8, 7)
    assert [r.id for r in drawn] == [r.id for r in records if r in drawn]


def test_smaller_sizes_are_subsets_and_other_draws_differ(records):
    ids = {n: {r.id for r in draw_pairs(records, n, balance="label", seed=1, draw=0)} for n in (4, 10, 20)}
    assert ids[4] < ids[10] < ids[20]
    others = {
        frozenset(r.id for r in draw_pairs(records, 10, balance="label", seed=s, draw=d))
        for s in (1, 2)
        for d in (0, 1)
    }
    assert len(others) == 4


def test_all_of_both_labels_are_the_smaller_class_and_as_many_of_the_larger(records):
    first, second = (draw_pairs(records, "all", balance="label", seed=1, draw=draw) for draw in (0, 1))
    assert [labels(drawn).count(label) for drawn in (first, second) for label in (0, 1)] == [10] * 4
    assert {r.id for r in first} != {r.id for r in second}
    assert draw_pairs(records, "all", balance="none", seed=1, draw=0) == records


def test_without_balance_any_pairs_are_drawn(records):
    assert len(draw_pairs(records, 40, balance="none", seed=0, draw=0)) == 40


def test_too_few_pairs_are_refused_with_the_numbers(records):
    with pytest.raises(UserInputError, match="22 pairs can't be drawn\n.*label 1: 10\n.*at most 20"):
        draw_pairs(records, 22, balance="label", seed=0, draw=0)
    with pytest.raises(UserInputError, match="41 pairs.*\n.*got: 40 pairs"):
        draw_pairs(records, 41, balance="none", seed=0, draw=0)


@pytest.mark.parametrize("n", [4, "all"])
def test_pairs_of_one_label_are_refused_by_its_name_and_no_n_is_offered(records, n):
    of_one = [record for record in records if record.content.label == 0]
    with pytest.raises(UserInputError, match="no pair of label 1(.|\n)*label 0: 30, label 1: 0") as caught:
        draw_pairs(of_one, n, balance="label", seed=0, draw=0)
    assert "at most" not in str(caught.value) and "select.balance: none" in str(caught.value)
