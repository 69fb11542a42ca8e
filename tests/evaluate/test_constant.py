"""The constant answer, counted by hand: 3 of 5 held-out facts without any model."""

from __future__ import annotations

from sftcore.evaluate.constant import constant_rows, frequent_answers, over_constant


def fact(relation: str, *answers: str) -> dict:
    return {"relation": relation, "answers": list(answers)}


TRAINED = [
    *(
        fact("P17", "United States of America"),
        fact("P17", "Norway"),
        fact("P17", "United States of America"),
    ),
    *(fact("P36", "Lima", "Oslo"), fact("P36", "Oslo")),
]
ITEMS = [
    fact("P17", "United States"),  # an alias of the constant
    fact("P17", "Norway"),
    fact("P36", "Ciudad de los Reyes", "Lima"),  # any of its answers
    fact("P17", "U.S."),
    fact("P50", "Lima"),  # no fact of this relation was trained
]


def rows(*right: int) -> list[dict]:
    made = {"prompt": "?", "prediction": "x", "split": "test"}
    return [{**made, "id": i, **item, "correct": i in right} for i, item in enumerate(ITEMS)]


def test_the_first_answers_are_counted_and_the_first_of_equals_wins():
    assert frequent_answers(TRAINED) == {"P17": "United States of America", "P36": "Lima"}
    assert frequent_answers([{"id": 3, "label": 1}]) == {}


def test_the_rule_is_judged_as_a_model_is():
    constant = constant_rows(TRAINED, rows())
    assert [row["correct"] for row in constant] == [True, False, True, True, False]
    assert [row["prediction"] for row in constant][3:] == ["United States of America", ""]


def test_without_a_trained_relation_there_is_no_rule():
    assert constant_rows(TRAINED, rows()[4:]) is None
    assert constant_rows([], rows()) is None


def test_a_model_that_learnt_the_constant_has_nothing_over_it():
    constant = constant_rows(TRAINED, rows())
    same = over_constant(constant, rows(0, 2, 3))
    assert same["difference"] == same["low"] == same["high"] == 0 and same["p_value"] == 1
    better = over_constant(constant, rows(0, 1, 2, 3, 4))
    assert (better["difference"], better["gained"], better["lost"]) == (0.4, 2, 0)
    assert over_constant(constant, rows(1))["difference"] == -0.4  # 1 gained, 3 lost
