"""Memory levels: the bounds of docs/methods.md, counted on integers, and rows that survive a round trip."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.knowledge.levels import LEVELS, FactLevel, level_counts, level_of

COUNTS = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def make_fact(hits: int, trials: int = 210, **changes: object) -> FactLevel:
    values = {
        "id": "P17-000001",
        "relation": "P17",
        "subject": "Gargallo",
        "answers": ("Italy",),
        "split": "train",
    }
    return FactLevel(hits=hits, trials=trials, **(values | changes))  # type: ignore[arg-type]


def test_bounds_of_the_full_probe() -> None:
    by_level = {level: [hits for hits in range(211) if level_of(hits, 210) == level] for level in LEVELS}
    bounds = {level: (hits[0], hits[-1]) for level, hits in by_level.items()}
    assert bounds == {0: (0, 0), 1: (1, 52), 2: (53, 105), 3: (106, 157), 4: (158, 210)}
    assert sum(map(len, by_level.values())) == 211


@given(COUNTS)
def test_level_is_the_quarter_that_holds_the_recall(counts: tuple[int, int]) -> None:
    hits, trials = counts
    level, recall = level_of(hits, trials), Fraction(hits, trials)
    assert recall == 0 if level == 0 else Fraction(level - 1, 4) < recall <= Fraction(level, 4)


@pytest.mark.parametrize(("hits", "trials"), [(-1, 210), (211, 210), (0, 0)])
def test_impossible_counts_are_refused(hits: int, trials: int) -> None:
    with pytest.raises(UserInputError, match="impossible counts of a probe"):
        level_of(hits, trials)


@given(COUNTS, st.lists(st.text(min_size=1), min_size=1, max_size=3), st.sampled_from(["train", "ood", ""]))
def test_a_row_survives_json(counts: tuple[int, int], answers: list[str], split: str) -> None:
    fact = make_fact(*counts, answers=tuple(answers), split=split)
    row = json.loads(json.dumps(fact.to_row()))
    assert FactLevel.from_row(row) == fact
    assert list(row)[:8] == ["id", "relation", "subject", "answers", "hits", "trials", "recall", "level"]


def test_a_row_without_split_is_read() -> None:
    row = make_fact(53).to_row()
    del row["split"]
    assert FactLevel.from_row(row) == make_fact(53, split="")


def test_a_row_that_lacks_keys_is_refused() -> None:
    row = make_fact(53).to_row()
    del row["hits"], row["level"]
    with pytest.raises(UserInputError, match="lacks hits, level"):
        FactLevel.from_row(row)


@pytest.mark.parametrize("change", [{"level": 3}, {"recall": 0.5}, {"hits": 52}])
def test_a_row_that_disagrees_with_itself_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(UserInputError, match="'P17-000001' disagrees with itself"):
        FactLevel.from_row(make_fact(53).to_row() | change)


def test_counts_name_every_level() -> None:
    assert level_counts([make_fact(0), make_fact(210), make_fact(200)]) == {0: 1, 1: 0, 2: 0, 3: 0, 4: 2}
