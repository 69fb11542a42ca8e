"""Rounds over a toy stage: each sees the last one's output, and what was killed between goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launcher_commands import save

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.fsio import write_json
from sftcore.recipe import changed, load_recipe
from sftcore.stages.rounds import run_rounds
from sftcore.stages.stage import Stage


class Doubling:
    """A stage that writes twice the number that the recipe's name ends with; fails in a round if asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails_at = ""

    def __call__(self, recipe: Recipe) -> None:
        self.calls.append(recipe.name)
        if recipe.name == self.fails_at:
            raise KeyboardInterrupt
        number = int(recipe.name.partition("-")[2])
        write_json(recipe.run_folder / "number.json", {"number": 2 * number})


def following(recipe: Recipe, last: Path | None) -> Recipe:
    number = json.loads((last / "number.json").read_text())["number"] if last else 3
    return changed(recipe, name=f"number-{number}")


@pytest.fixture
def recipe(tiny_recipe) -> Recipe:
    return load_recipe(Path(save(tiny_recipe)))


def test_each_round_begins_with_the_last_ones_output_and_goes_on_after_a_kill(recipe):
    toy = Doubling()
    unwanted = Stage(name="unwanted", run=lambda recipe: 1 / 0, is_wanted=lambda recipe: False)
    stages = [Stage(name="toy", run=toy), unwanted]
    toy.fails_at = "number-6"
    with pytest.raises(KeyboardInterrupt):
        run_rounds(recipe, stages, num_rounds=3, following=following)
    assert toy.calls == ["number-3", "number-6"], "the second round sees the first one's 2 x 3"
    toy.fails_at = ""
    last = run_rounds(recipe, stages, num_rounds=3, following=following)
    assert toy.calls[2:] == ["number-6", "number-12"], "the first round is not done again"
    assert json.loads((last / "number.json").read_text()) == {"number": 24}
    assert last == Path("runs/tiny/rounds/3").resolve()
    assert run_rounds(recipe, stages, num_rounds=3, following=following) == last and len(toy.calls) == 4


def test_rounds_of_another_recipe_are_refused(recipe):
    stages = [Stage(name="toy", run=Doubling())]
    run_rounds(recipe, stages, num_rounds=1, following=following)
    other = changed(recipe, **{"train.epochs": 7})
    with pytest.raises(UserInputError, match="this round was done under another recipe"):
        run_rounds(other, stages, num_rounds=2, following=following)
    with pytest.raises(UserInputError, match="no round to do"):
        run_rounds(recipe, stages, num_rounds=0, following=following)


def test_a_report_is_given_the_rounds_folder(recipe):
    given: list[object] = []
    stages = [Stage(name="toy", run=Doubling()), Stage(name="page", run=given.append, takes="folder")]
    assert run_rounds(recipe, stages, num_rounds=2, following=following) == given[-1] and len(given) == 2
