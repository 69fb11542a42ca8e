"""The table of a study: rows, axes, means over draws, differences by item, all by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftcore.errors import UserInputError
from sftcore.study.table import (
    Run,
    check_same_items,
    differing_keys,
    grouped,
    interval,
    is_clear,
    pairwise,
    read_table,
    right_shares,
    spread,
)


def run(name: str, right: int, *, items: int = 10, **recipe) -> Run:
    rows = [{"id": i, "split": "test", "correct": i < right} for i in range(items)]
    rows += [{"id": 0, "split": "ood", "correct": True}]
    return Run(name=name, recipe=recipe, n=6, rows=rows, scores={"accuracy": right / items}, metrics={})


def test_rows_are_of_finished_runs_and_the_others_say_what_they_lack(tmp_path: Path):
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("{}")
    (tmp_path / "logs").mkdir()
    read = lambda path: "no weights" if path.name == "b" else run(path.name, 1)  # noqa: E731
    table = read_table(tmp_path, read, needed="trained")
    assert [row.name for row in table.runs] == ["a", "c"] and table.name == tmp_path.name
    assert table.unfinished == {"b": "no weights"}
    with pytest.raises(UserInputError, match=r"(?s)no finished run of a study.*let at least one run be tr"):
        read_table(tmp_path, lambda _: "nothing", needed="trained")


def test_axes_are_the_keys_in_which_recipes_differ():
    runs = [run("a", 1, lr=1, seed=1), run("b", 1, lr=2, seed=1, new=3), run("c", 1, lr=2, seed=1)]
    recipes = [row.recipe for row in runs]
    assert differing_keys(recipes) == ["lr"] and differing_keys(recipes, ["lr"]) == []
    assert differing_keys(recipes, absent_differs=True) == ["lr", "new"]
    groups = grouped(runs, lambda row: row.recipe["lr"])
    assert {lr: [row.name for row in rows] for lr, rows in groups.items()} == {1: ["a"], 2: ["b", "c"]}


def test_groups_are_compared_by_item():
    """Of ten items the first two runs get 4 and 6, the third 2: items 2 and 3 by both, 4 and 5 by one."""
    groups = {"two": [run("a", 4), run("b", 6)], "one": [run("c", 2)], "same": [run("d", 5)]}
    assert right_shares(groups["two"]) == {i: 1.0 if i < 4 else 0.5 if i < 6 else 0.0 for i in range(10)}
    assert right_shares(groups["two"], "ood") == {0: 1.0}
    found = pairwise(groups)
    assert [(part["first"], part["second"]) for part in found] == [
        ("one", "same"),
        ("one", "two"),
        ("same", "two"),
    ]
    differences = [0, 0, -1, -1, -0.5, -0.5, 0, 0, 0, 0]
    deviation = (sum((d + 0.3) ** 2 for d in differences) / 9) ** 0.5
    part = found[1]
    assert part["difference"] == pytest.approx(-0.3) and not part["draws_overlap"]
    assert part["high"] - part["low"] == pytest.approx(2 * 1.96 * deviation / 10**0.5)
    assert found[2]["draws_overlap"] and found[2]["difference"] == 0
    assert spread([0.4, 0.6]) == {"mean": 0.5, "low": 0.4, "high": 0.6, "draws": [0.4, 0.6]}


def test_the_more_comparisons_the_wider_the_interval_has_to_be():
    part = interval([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert part["difference"] == 0.5 and part["low"] > 0
    assert [is_clear(part, comparisons=n) for n in (0, 1, 10, 10_000)] == [True, True, True, False]
    assert not is_clear({"difference": -0.5, "low": -0.6}, comparisons=1)


def test_runs_on_other_items_are_refused_for_the_splits_that_count():
    other = run("other", 1)
    more = Run(name="more", recipe={}, scores={}, metrics={}, rows=[*other.rows, {"id": 1, "split": "ood"}])
    check_same_items([other, more], ["test"])
    with pytest.raises(UserInputError, match="other and more: these runs were evaluated on different items"):
        check_same_items([other, more], ["test", "ood"])
