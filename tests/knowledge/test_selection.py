"""Selection: exact sizes, equal shares, nested and repeatable draws, whatever the order of the input."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.knowledge.levels import FactLevel
from sftcore.knowledge.selection import equal_shares, select_facts

HITS_OF_LEVEL = {0: 0, 1: 20, 2: 80, 3: 120, 4: 210}  # of 210 trials
SUPPLIES = st.dictionaries(st.sampled_from(["P17", "P19", "P20", "P36"]), st.integers(1, 12), min_size=1)


def make_facts(supply: dict[str, int], level: int = 2, split: str = "train") -> list[FactLevel]:
    return [
        FactLevel(
            id=f"{relation}-{level}-{number:03d}",
            relation=relation,
            subject=f"subject {number}",
            answers=("answer",),
            hits=HITS_OF_LEVEL[level],
            trials=210,
            split=split,
        )
        for relation, count in supply.items()
        for number in range(count)
    ]


def ids(facts: list[FactLevel]) -> list[str]:
    return [fact.id for fact in facts]


def test_sixty_facts_of_ten_relations_are_six_each() -> None:
    facts = make_facts({f"P{i}": 20 + i for i in range(10)})
    chosen = select_facts(facts, levels_wanted=[2], n=60, balance="relation", seed=17)
    assert set(Counter(fact.relation for fact in chosen).values()) == {6}
    assert len(set(ids(chosen))) == 60


def test_only_wanted_levels_are_drawn() -> None:
    facts = [fact for level in HITS_OF_LEVEL for fact in make_facts({"P17": 5, "P19": 5}, level)]
    chosen = select_facts(facts, levels_wanted=[1, 3], n=20, balance="relation", seed=0)
    assert Counter(fact.level for fact in chosen) == {1: 10, 3: 10}


@given(SUPPLIES, st.data())
def test_shares_are_equal_up_to_supply_and_remainder(supply: dict[str, int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, sum(supply.values())))
    shares = equal_shares(supply, n)
    assert sum(shares.values()) == n
    assert all(shares[relation] <= supply[relation] for relation in supply)
    not_used_up = {relation: share for relation, share in shares.items() if share < supply[relation]}
    for relation, share in not_used_up.items():
        assert max(shares.values()) - share <= 1  # nobody got more than one above who could have had more
        larger = [other for other in not_used_up if supply[other] > supply[relation]]
        assert all(shares[other] >= share for other in larger)  # the remainder went to the largest


@given(
    SUPPLIES,
    st.integers(0, 3),
    st.sampled_from(["relation", "level", "none"]),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_order_of_the_input_does_not_matter_and_draws_are_nested(
    supply, draw, balance, shuffler, data
) -> None:
    facts = make_facts(supply)
    small = data.draw(st.integers(1, len(facts)))
    large = data.draw(st.integers(small, len(facts)))

    def select(n: int) -> list[str]:
        return ids(select_facts(facts, levels_wanted=[2], n=n, balance=balance, seed=3, draw=draw))

    before = select(large)
    assert len(set(before)) == large and set(select(small)) <= set(before)
    shuffler.shuffle(facts)
    assert select(large) == before


def test_seeds_and_draws_differ() -> None:
    facts = make_facts({"P17": 50, "P19": 50})
    picks = {
        tuple(ids(select_facts(facts, levels_wanted=[2], n=10, balance="relation", seed=seed, draw=draw)))
        for seed in (1, 2)
        for draw in (0, 1)
    }
    assert len(picks) == 4


def test_a_draw_is_pinned() -> None:
    facts = make_facts({"P17": 9, "P19": 9})
    random.shuffle(facts)
    chosen = select_facts(facts, levels_wanted=[2], n=4, balance="relation", seed=17)
    assert ids(chosen) == ["P19-2-000", "P19-2-005", "P17-2-004", "P17-2-007"]


@given(st.integers(1, 121), st.integers(0, 3))
def test_a_divided_set_has_equal_shares_of_the_levels_and_of_relations_within(n, draw) -> None:
    facts = make_facts({"P17": 30, "P19": 30}, level=1) + make_facts({"P17": 50, "P20": 20}, level=3)

    def select(n: int) -> list[FactLevel]:
        return select_facts(facts, levels_wanted=[1, 3], n=n, balance="level", seed=5, draw=draw)

    chosen = select(n)
    shares = Counter(fact.level for fact in chosen)
    assert len(chosen) == n and abs(shares[1] - shares[3]) <= 1
    for level, few in ((1, 60), (3, 40)):  # while no relation is used up
        by_relation = Counter(fact.relation for fact in chosen if fact.level == level)
        assert shares[level] > few or max(by_relation.values(), default=0) - shares[level] / 2 <= 0.5
    assert set(ids(select(max(1, n - 7)))) <= set(ids(chosen))


def test_a_divided_set_of_unequal_shares_is_refused_with_what_could_be_given() -> None:
    facts = (
        make_facts({"P17": 3}, level=1) + make_facts({"P17": 9}, level=3) + make_facts({"P17": 4}, level=4)
    )

    def select(levels: list[int], n) -> Counter[int]:
        chosen = select_facts(facts, levels_wanted=levels, n=n, balance="level", seed=5)
        return Counter(fact.level for fact in chosen)

    assert select([1, 3], 7) == {1: 3, 3: 4} and select([1, 3, 4], 11) == {1: 3, 3: 4, 4: 4}
    assert select([1, 3, 4], "all") == {1: 3, 3: 3, 4: 3}, (
        "the level with the fewest, and as many of each other"
    )
    with pytest.raises(
        UserInputError, match="equal shares: 8 wanted of level 1, 3\n(.|\n)*n up to 7"
    ) as caught:
        select([1, 3], 8)
    assert "level 1: 3, level 2: 0, level 3: 9" in str(caught.value)
    assert "lower select.n to 7, take the level" in str(caught.value)
    with pytest.raises(UserInputError, match="too few facts: 13 wanted of level 1, 3, 12 there"):
        select([1, 3], 13)
    for n in (1, 4, "all"):
        with pytest.raises(UserInputError, match=f"no fact of level 2: {n} wanted of level 1, 2\n"):
            select([1, 2], n)


@pytest.mark.parametrize("n", [2, "all"])
@pytest.mark.parametrize("balance", ["relation", "level", "none"])
def test_levels_without_a_fact_are_named_and_no_n_is_offered(n, balance) -> None:
    facts = make_facts({"P17": 3}, level=2)
    with pytest.raises(UserInputError, match=f"no fact of level 0, 3: {n} wanted of level 0, 3\n") as caught:
        select_facts(facts, levels_wanted=[3, 0], n=n, balance=balance, seed=1)
    message = str(caught.value)
    assert "level 2: 3" in message and "do: name levels" in message
    assert "allowed" not in message and "lower" not in message


def test_all_of_some_levels_are_taken_where_they_need_no_equal_shares() -> None:
    facts = make_facts({"P17": 3}, level=2) + make_facts({"P17": 5}, level=4)
    for balance in ("relation", "none"):
        assert len(select_facts(facts, levels_wanted=[2, 4], n="all", balance=balance, seed=1)) == 8


def test_balance_none_ignores_relations() -> None:
    facts = make_facts({"P17": 300, "P19": 3})
    chosen = select_facts(facts, levels_wanted=[2], n=100, balance="none", seed=5)
    assert Counter(fact.relation for fact in chosen)["P17"] > 90


def test_too_few_facts_names_counts_and_remedy() -> None:
    facts = make_facts({"P17": 3}, level=2) + make_facts({"P17": 7}, level=4)
    with pytest.raises(UserInputError, match="too few facts: 60 wanted of level 2, 3 there") as caught:
        select_facts(facts, levels_wanted=[2], n=60, balance="relation", seed=17)
    assert "level 0: 0, level 1: 0, level 2: 3, level 3: 0, level 4: 7" in str(caught.value)
    assert "lower select.n to 3" in str(caught.value)


def test_all_faults_of_a_request_come_at_once() -> None:
    facts = make_facts({"P17": 3}) + make_facts({"P17": 1}, split="test")
    with pytest.raises(UserInputError) as caught:
        select_facts(facts, levels_wanted=[5], n=0, balance="none", seed=0)
    message = str(caught.value)
    for part in ("nothing to select", "no such memory level", "more than one split", "the same id"):
        assert part in message
    assert "1, e.g. P17-2-000" in message
