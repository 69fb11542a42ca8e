"""The estimate ahead of a study: more work takes longer; shared work counts once, or not where done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sftcore.config import Recipe
from sftcore.knowledge.level_files import LEVEL_FILES
from sftcore.planning import estimate
from sftcore.planning.estimate import estimate_seconds, probe_seconds
from sftcore.precision import matmul_rate
from sftcore.recipe import load_recipe
from sftcore.stages.whole_run import shared_name
from sftcore.train.devices import choose_device

RATE = 1e6  # FLOP a second: a machine so slow that a tiny model's work outweighs the constants


@pytest.fixture
def slow_machine(monkeypatch):
    monkeypatch.setattr(estimate, "matmul_rate", lambda _: RATE)


def recipes(tiny_recipe: dict, write, count: int, **changes) -> list[Recipe]:
    select = {"n": 8, "levels": [0], **changes}
    return [load_recipe(write(tiny_recipe | {"select": select | {"draw": draw}})) for draw in range(count)]


@pytest.fixture
def write():
    import yaml

    def to_file(recipe: dict) -> Path:
        Path("r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return Path("r.yaml")

    return to_file


def test_more_runs_and_more_facts_take_longer_and_the_probe_counts_once(tiny_recipe, write, slow_machine):
    [one], [first, second] = (estimate_seconds(recipes(tiny_recipe, write, n), Path("none")) for n in (1, 2))
    [larger] = estimate_seconds(recipes(tiny_recipe, write, 1, n=16), Path("none"))
    assert first == one and 0 < second < one, "memory levels and the base model's answers are shared"
    assert one < larger < 2 * one


def test_what_is_there_is_not_counted(tiny_recipe, write, slow_machine):
    (recipe,) = recipes(tiny_recipe, write, 1)
    [before] = estimate_seconds([recipe], Path("shared"))
    folder = Path("shared") / shared_name("levels", recipe)
    folder.mkdir(parents=True)
    assert estimate_seconds([recipe], Path("shared")) == [before], "a probe was begun"
    for name in LEVEL_FILES:
        (folder / name).touch()
    [after] = estimate_seconds([recipe], Path("shared"))
    sizes = estimate._sizes(recipe.model_dump_json(include={"data", "model", "task", "matching", "batch"}))
    assert before - after == pytest.approx(estimate._probing(recipe, sizes, RATE))


def test_large_data_are_not_read_for_it(tiny_recipe, write, slow_machine, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_SOURCE_BYTES", 10)
    assert estimate_seconds(recipes(tiny_recipe, write, 1), Path("none")) is None


def test_the_rate_is_one_of_a_computer():
    assert 1e8 < matmul_rate("float32") < 1e16


def test_a_probe_on_a_gpu_is_bound_by_its_rate_or_by_its_forwards(tiny_recipe, write):
    """56 prompts x 3 samples are 168 rows of 4 tokens: 168 / 640 x 4 forwards of 20 ms."""
    recipe = load_recipe(write(tiny_recipe))
    device = choose_device("h100")
    assert probe_seconds(recipe, 56, device) == pytest.approx(168 / 640 * 4 * 0.02)
    slow = replace(device, peak_flops=1e6)
    assert probe_seconds(recipe, 28, slow) > 1, "bound by the rate"
    assert probe_seconds(recipe, 56, slow) == pytest.approx(2 * probe_seconds(recipe, 28, slow))
    assert probe_seconds(recipe, 56, replace(device, peak_flops=None)) is None
