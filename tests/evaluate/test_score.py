"""What must hold for scores: every item counted once, intervals that contain the share, exact p-values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.evaluate.score import mcnemar_p, natural_key, paired_change, score, side_by_side, wilson_interval


def row(id_: str, correct: bool, **more: Any) -> dict[str, Any]:
    return {"id": id_, "prompt": "Q", "prediction": "A", "correct": correct, "split": "test", **more}


def test_wilson_matches_its_closed_forms() -> None:
    z2 = 1.96**2
    low, high = wilson_interval(0, 10) or (9, 9)
    assert low == 0.0 and math.isclose(
        high, z2 / (10 + z2)
    )  # at share 0 the formula shrinks to z^2 / (n + z^2)
    low, high = wilson_interval(50, 100) or (9, 9)
    half = 1.96 * math.sqrt(0.25 / 100 + z2 / 40000) / (1 + z2 / 100)
    assert math.isclose(low, 0.5 - half) and math.isclose(high, 0.5 + half)


def test_no_items_have_no_interval() -> None:
    assert wilson_interval(0, 0) is None


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_mirrors_and_narrows(case: tuple[int, int]) -> None:
    correct, n = case
    low, high = wilson_interval(correct, n) or (9, 9)
    assert 0 <= low <= correct / n <= high <= 1 and low < high
    mirrored_low, mirrored_high = wilson_interval(n - correct, n) or (9, 9)
    assert math.isclose(low, 1 - mirrored_high, abs_tol=1e-9)
    assert math.isclose(high, 1 - mirrored_low, abs_tol=1e-9)
    wider = wilson_interval(correct, n, z=2.58) or (9, 9)
    assert wider[0] <= low and high <= wider[1]
    ten_times = wilson_interval(10 * correct, 10 * n) or (9, 9)
    assert ten_times[1] - ten_times[0] < high - low


def test_score_by_hand() -> None:
    rows = [
        row("a", True, level=0, relation="P17"),
        row("b", False, level=0, relation="P131"),
        row("c", True, level=4, relation="P17"),
        row("d", False),
        row("a", True, split="ood", level=2),
    ]
    scores = score(rows)
    assert (scores["split"], scores["n"], scores["correct"], scores["accuracy"]) == ("test", 4, 2, 0.5)
    assert {level: (cell["n"], cell["correct"]) for level, cell in scores["by_level"].items()} == {
        "0": (2, 1),
        "4": (1, 1),
    }
    assert scores["mean_over_levels"] == (0.5 + 1.0) / 2 != scores["accuracy"]
    assert scores["levels_counted"] == [0, 4] and scores["without_level"] == 1
    assert list(scores["by_relation"]) == ["P17", "P131"]
    assert list(scores["splits"]) == ["test", "ood"]
    assert scores["splits"]["ood"]["n"] == 1 and scores["splits"]["test"]["n"] == 4


def test_without_a_test_split_the_top_level_is_empty_not_wrong() -> None:
    scores = score([row("a", True, split="ood")])
    assert scores["n"] == 0 and scores["accuracy"] is None and scores["low"] is None
    assert scores["mean_over_levels"] is None and scores["splits"]["ood"]["accuracy"] == 1.0


ROWS = st.lists(
    st.builds(
        row,
        st.integers(0, 10**6).map(str),
        st.booleans(),
        level=st.none() | st.integers(0, 4),
        relation=st.none() | st.sampled_from(["P17", "P131"]),
        split=st.sampled_from(["test", "ood"]),
    ),
    unique_by=lambda item: (item["split"], item["id"]),
)


@given(ROWS, st.randoms())
def test_every_item_counts_once_in_any_order(rows: list[dict[str, Any]], random: Any) -> None:
    scores = score(rows)
    assert sum(block["n"] for block in scores["splits"].values()) == len(rows)
    for block in scores["splits"].values():
        assert sum(cell["n"] for cell in block["by_level"].values()) + block["without_level"] == block["n"]
        assert sum(cell["correct"] for cell in block["by_level"].values()) <= block["correct"] <= block["n"]
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert score(shuffled) == scores


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": None}, r"p\.jsonl:2: field 'id'\n    got: None\n    allowed: str or int"),
        ({"correct": 1}, r"p\.jsonl:2: field 'correct'\n    got: 1\n    allowed: bool"),
        ({"split": None}, r"field 'split'"),
        ({"prompt": None}, r"field 'prompt'"),
        ({"prediction": 3}, r"field 'prediction'"),
        ({"level": 5}, r"field 'level'\n    got: 5\n    allowed: 0\.\.4, or left out"),
        ({"level": True}, r"field 'level'\n    got: True"),
        ({"level": 2.0}, r"field 'level'\n    got: 2\.0"),
        ({"relation": 17}, r"field 'relation'\n    got: 17"),
        ({"id": "a"}, r"p\.jsonl:2: this id occurs twice\n    got: 'a'"),
    ],
)
def test_bad_rows_are_named(bad: dict[str, Any], message: str) -> None:
    rows = [row("a", True), row("b", True) | bad]
    with pytest.raises(UserInputError, match=message):
        score(rows, where="p.jsonl")
    with pytest.raises(UserInputError, match=message):
        paired_change([row("a", True)], rows, where=("base", "p.jsonl"))


def test_a_missing_field_is_said_to_be_missing_and_many_problems_are_cut_short() -> None:
    with pytest.raises(UserInputError, match="got: nothing") as caught:
        score([{} for _ in range(2)])  # 2 rows x 5 fields
    assert len(caught.value.problems) == 6
    assert "and 5 more problems like these" in str(caught.value)


def test_paired_change_by_hand() -> None:
    base = [row("a", True), row("b", False), row("c", False), row("d", True), row("e", False)]
    tuned = [row("e", False), row("d", False), row("c", True), row("b", True), row("a", True)]
    assert paired_change(base, tuned) == {
        "n": 5,
        "both_right": 1,
        "gained": 2,
        "lost": 1,
        "both_wrong": 1,
        "p_value": 1.0,  # 2 * (C(3,0) + C(3,1)) / 2^3
    }


def test_other_items_are_refused_with_an_example_of_each_side() -> None:
    base, tuned = [row("a", True), row("b", True)], [row("a", True), row("c", True), row("d", True)]
    examples = r"1 only in base \(such as 'b'\); 2 only in tuned \(such as 'c'\)"
    with pytest.raises(UserInputError, match=r"base and tuned: .*different items(.|\n)*" + examples):
        paired_change(base, tuned)


def test_the_same_id_in_another_split_is_another_item() -> None:
    with pytest.raises(UserInputError, match="different items"):
        paired_change([row("a", True)], [row("a", True, split="ood")])


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_counts_what_listing_all_coin_flips_counts(gained: int, lost: int) -> None:
    changed = gained + lost
    extreme = [
        sum(flips) <= min(gained, lost) for flips in itertools.product((0, 1), repeat=min(changed, 12))
    ]
    if changed <= 12:
        assert mcnemar_p(gained, lost) == min(1.0, 2 * sum(extreme) / 2**changed)
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)


def test_mcnemar_survives_thousands_of_changes() -> None:
    assert mcnemar_p(6000, 0) == 0.0 and mcnemar_p(3000, 3000) == 1.0
    assert 0.04 < mcnemar_p(3077, 2923) < 0.05  # z = 153 / sqrt(6000) = 1.975 with continuity correction


def test_side_by_side_keeps_n_and_leaves_an_unevaluated_model_empty() -> None:
    base = score([row("a", True, level=1), row("b", False, level=2)])["splits"]["test"]
    table = side_by_side(base, None)
    assert (table["n"], table["acc_base"], table["acc_tuned"], table["low_tuned"]) == (2, 0.5, None, None)
    assert table["by_level"]["1"]["acc_base"] == 1.0 and table["by_level"]["1"]["n"] == 1
    assert table["mean_over_levels"] == {"base": 0.5, "tuned": None, "levels_counted": [1, 2]}
    both = side_by_side(base, base)
    assert both["acc_tuned"] == 0.5 and both["by_level"].keys() == {"1", "2"}
    assert side_by_side(None, None)["n"] == 0


def test_side_by_side_refuses_levels_that_moved() -> None:
    base = score([row("a", True, level=1), row("b", False, level=1)])["splits"]["test"]
    tuned = score([row("a", True, level=1), row("b", False, level=2)])["splits"]["test"]
    with pytest.raises(UserInputError, match=r"test, by_level 1: .*disagree(.|\n)*2 before, 1 after"):
        side_by_side(base, tuned)
    with pytest.raises(UserInputError, match=r"test, by_level 2: .*disagree(.|\n)*0 before, 1 after"):
        side_by_side({**base, "by_level": {}}, {**tuned, "by_level": {"2": tuned["by_level"]["2"]}})


@given(st.lists(st.text(alphabet="P0123456789 中", max_size=6)))
def test_natural_key_orders_any_names(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
