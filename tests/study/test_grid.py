"""A study expands into named, valid runs in a fixed order, or tells every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sftcore.errors import UserInputError
from sftcore.study.grid import expand, expand_cells, read_study, value_labels


def write_study(recipe: dict, **keys) -> Path:
    Path("base.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    Path("sizes.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", **keys}, sort_keys=False), encoding="utf-8"
    )
    return Path("sizes.yaml")


def test_every_combination_is_a_run_with_its_own_recipe_name_and_folder(tiny_recipe, tmp_path):
    grid = {"select.n": [6, 12], "select.levels": [[2], [0, 1, 2, 3, 4]]}
    settings = read_study(write_study(tiny_recipe, set={"train.lr": 3e-4}, grid=grid, draws=2))
    runs = expand(settings, tmp_path / "out")
    assert [run.name for run in runs[:3]] == [
        "n-6_levels-2_draw-0",
        "n-6_levels-2_draw-1",
        "n-6_levels-0-1-2-3-4_draw-0",
    ]
    assert len(runs) == len({run.name for run in runs}) == 8
    for run in runs:
        assert run.recipe.run_folder == tmp_path / "out" / run.name and run.recipe.name == run.name
        select = run.recipe.select
        assert [select.n, select.levels, select.draw] == list(run.cell.values())
        assert run.recipe.train.lr == 3e-4, "of all runs, so in no name"


def test_grids_of_a_list_are_run_in_turn(tiny_recipe, tmp_path):
    grids = [{"select.n": [6], "select.levels": [[0], [1]]}, {"select.n": [12], "select.levels": [[0]]}]
    runs = expand(read_study(write_study(tiny_recipe, grid=grids)), tmp_path / "out")
    assert [run.name for run in runs] == ["n-6_levels-0", "n-6_levels-1", "n-12_levels-0"]


def test_names_stay_apart_where_values_or_keys_look_alike():
    names = [name for name, _ in expand_cells({"a.n": [1, 2], "b.n": ["x/y", "x y"]}, 1)]
    assert names == ["a-n-1_b-n-v0", "a-n-1_b-n-v1", "a-n-2_b-n-v0", "a-n-2_b-n-v1"]
    assert value_labels(["x" * 30, "y"]) == ["v0", "v1"]
    assert [name for name, _ in expand_cells({}, 1)] == ["run"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": "absent.yaml"}, "no such recipe"),
        ({"gird": {}}, r"(?s)sizes.yaml: gird.*allowed: name, base, set, grid, draws"),
        ({"grid": {"train.lr": []}}, r"(?s)grid.0.train.lr: .*allowed: a list with 1 or more items"),
        ({"set": {"train.lr": 1}, "grid": {"train": [{"lr": 1}]}}, r"(?s)in its grid, too.*got: train.lr"),
        ({"set": {"select.draw": 1, "name": "x"}, "draws": 2}, "got: select.draw, name"),
        ({"draws": 0}, r"draws: (.|\n)*allowed: a number over 0"),
        ({"grid": []}, r"grid: (.|\n)*allowed: a list with 1 or more items"),
        ({"grid": [{"train.lr": [1]}, {"train.lr": [1, 2]}]}, r"(?s)runs of the same name.*got: lr-1"),
        (
            {"grid": {"train.lrr": [1], "batch.capacity": [0, 64]}},
            r"(?s)capacity.*lrr.*'lr'|lrr.*'lr'.*capacity",
        ),
    ],
)
def test_mistakes_are_told_together_and_each_once(tiny_recipe, tmp_path, keys, message):
    with pytest.raises(UserInputError, match=message) as raised:
        expand(read_study(write_study(tiny_recipe, **keys)), tmp_path)
    assert len({str(p) for p in raised.value.problems}) == len(raised.value.problems)


def test_files_that_are_no_study(tmp_path):
    with pytest.raises(UserInputError, match="no such study"):
        read_study(tmp_path / "absent.yaml")
    for text, message in (("[1]", "a study is a YAML mapping"), ("{", "not valid YAML")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(UserInputError, match=message):
            read_study(tmp_path / "s.yaml")
