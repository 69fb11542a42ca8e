"""A recipe with other values is checked like one from a file, and forgets nothing."""

from __future__ import annotations

import pytest

from sftcore.config import ADAPTER_LR, FULL_LR, Recipe
from sftcore.errors import UserInputError
from sftcore.recipe import changed


def small(**values) -> Recipe:
    source = {"format": "facts", "path": "f.jsonl"}
    return Recipe.model_validate(
        {"model": {"path": "m"}, "data": {"train": [source]}, "batch": {"samples_per_step": 8}} | values
    )


def test_keys_and_sections_change_and_all_others_stay():
    recipe = small(name="a", select={"n": 3})
    other = changed(recipe, **{"name": "b", "train.epochs": 2, "select": None, "data.test": []})
    assert (other.name, other.train.epochs, other.select) == ("b", 2, None)
    expected = recipe.model_dump() | {"name": "b", "select": None}
    expected["train"]["epochs"] = 2
    assert other.model_dump() == expected
    assert changed(other, **{"select.n": 5}).select.n == 5, "a section that was null"


def test_a_rate_that_nobody_gave_still_follows_the_adapter():
    recipe = small()
    assert recipe.train.lr == FULL_LR and not recipe.says_lr
    with_adapter = changed(recipe, **{"adapter.kind": "lora"})
    assert with_adapter.train.lr == ADAPTER_LR and not with_adapter.says_lr
    assert changed(recipe, **{"train.lr": 0.5}).says_lr


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserInputError) as caught:
        changed(small(), **{"train.epochs": -1, "train.epoch": 2})
    said = str(caught.value)
    assert len(caught.value.problems) == 2 and "did you mean 'epochs'?" in said and "train.epochs" in said
    with pytest.raises(UserInputError, match=r"must be a multiple of capacity"):
        changed(small(), batch={"tokens_per_step": 1000, "capacity": 300})
