"""A study's page follows from its runs' predictions: cells, diagonal and best set by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, write_json, write_jsonl
from sftcore.study.qa_study import summarise_study
from sftcore.study.study_figures import heat_map
from sftcore.study.study_report import write_study_report
from sftcore.study.study_runs import is_study, read_study_runs

ITEMS = [("test", i, 1 if i < 40 else 2) for i in range(60)] + [("ood", i, 1) for i in range(5)]


def right_of(level: int, draw: int) -> set[tuple[str, int]]:
    """Level 1: 20 + draw of its own 40 items, none of the other 20. Level 2: 10 and 10."""
    if level == 1:
        return {("test", i) for i in range(20 + draw)}
    return {("test", i) for i in [*range(10), *range(40, 50)]} | {("ood", 0)}


def write_run(
    folder: Path, *, levels: list[int], n: int, draw: int, right, items=ITEMS, balance: str = "relation"
) -> None:
    folder.mkdir(parents=True)
    select = {"levels": levels, "n": n, "draw": draw, "balance": balance}
    recipe = {"model": {"path": "/models/small"}, "select": select}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    write_jsonl(folder / "selection.jsonl", [{"id": str(i), "level": levels[0]} for i in range(n)])
    for model, correct in (("tuned", right), ("base", set())):
        rows = [
            {
                "id": i,
                "prompt": "Q",
                "prediction": "<b>A</b>",
                "split": split,
                "level": level,
                "relation": "P17" if i % 2 else "P<36>",
                "correct": (split, i) in correct,
            }
            for split, i, level in items
        ]
        write_jsonl(folder / "eval" / model / "predictions.jsonl", rows)
    write_json(folder / "eval" / "drift.json", {"n": 3, "mean_kl_nats": 0.5 + draw})
    write_jsonl(folder / "levels.jsonl", [{"id": "x", "level": 2, "split": "train"}])
    write_json(folder / "levels.manifest.json", {"templates": 4})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    for level in (1, 2):
        for draw in (0, 1):
            name = f"levels-{level}_draw-{draw}"
            write_run(folder / name, levels=[level], n=6, draw=draw, right=right_of(level, draw))
    write_run(folder / "mixed", levels=[1, 2], n=6, draw=0, right=set())
    (folder / "started").mkdir()
    (folder / "started" / "recipe.yaml").write_text("{}")
    return folder


def test_cells_are_means_over_draws(study):
    report = summarise_study(read_study_runs(study))
    cells = {cell["level"]: cell for cell in report["cells"]}
    one = cells["1"]["splits"]["test"]
    assert one["by_level"]["1"] == {"n": 40, "mean": 0.5125, "low": 0.5, "high": 0.525, "draws": [0.5, 0.525]}
    assert one["by_level"]["2"]["mean"] == 0 and one["by_level"]["2"]["n"] == 20
    assert one["mean_over_levels"]["draws"] == [0.5, 0.525], "level 2 has 20 items: too few"
    assert one["levels_counted"] == [1]
    two = cells["2"]["splits"]["test"]
    assert two["mean_over_levels"]["draws"] == [0.25, 0.25] and cells["2"]["splits"]["ood"]["n"] == 5
    assert cells["1"]["drift_nats"] == 1.0 and cells["mixed"]["runs"] == ["mixed"]
    assert report["unfinished"] == {"started": "no selection.jsonl, eval/tuned/predictions.jsonl"}
    assert report["others"]["base"]["test"]["mean_over_levels"] == 0


def test_a_set_divided_among_levels_has_a_row_of_its_own(study):
    before = summarise_study(read_study_runs(study))
    write_run(study / "divided", levels=[1, 2], n=6, draw=0, right=set(), balance="level")
    report = summarise_study(read_study_runs(study))
    assert {cell["level"] for cell in report["cells"]} == {"1", "2", "mixed", "divided"}
    assert report["diagonal"] == before["diagonal"], "it is of no single level"
    write_study_report(study)
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "6 facts of divided levels" in page and ">level divided<" not in page


def test_the_diagonal_is_paired_by_item(study):
    (effect,) = summarise_study(read_study_runs(study))["diagonal"]  # level 2 has 20 items: too few
    assert (effect["level"], effect["num_items"], effect["n"]) == (1, 40, 6)
    assert effect["own"] == pytest.approx(0.5125) and effect["others"] == 0.25
    differences = [0] * 10 + [1] * 10 + [0.5] + [0] * 19  # items 0-9 by both, 10-19 by level 1, 20 by draw 1
    mean = sum(differences) / 40
    deviation = (sum((d - mean) ** 2 for d in differences) / 39) ** 0.5
    assert effect["difference"] == pytest.approx(mean)
    assert effect["high"] - effect["low"] == pytest.approx(2 * 1.96 * deviation / 40**0.5)


def test_the_best_set_is_recommended_and_doubted_where_draws_overlap(study):
    report = summarise_study(read_study_runs(study))
    assert (report["best"]["level"], report["best"]["n"], report["best"]["is_clear"]) == ("1", 6, True)
    first = "For this model, train on 6 facts of level 1: 51.2 % (mean over test level 1, 2 draws)."
    assert report["verdict"][0] == first
    more = {("test", i) for i in range(60)}  # a third draw of level 2 that gets everything right
    write_run(study / "levels-2_draw-2", levels=[2], n=6, draw=2, right=more)
    doubtful = summarise_study(read_study_runs(study))
    assert doubtful["best"]["level"] == "1" and not doubtful["best"]["is_clear"]
    assert "don't tell it apart from 6 facts of level 2" in doubtful["verdict"][1]


def test_the_page_holds_the_numbers_and_nothing_unescaped(study):
    result = write_study_report(study)
    page = result.html_path.read_text(encoding="utf-8")
    assert "P&lt;36&gt;" in page and "P<36>" not in page and "<b>A" not in page
    assert page.count("<svg") == 5  # levels, two curves, two maps
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "51.2 %" in page and "25.0 %" in page and "started" in page
    assert read_json(result.json_path)["num_runs"] == 5
    assert "6 facts of level 1" in result.table and "not finished: started" in result.table
    again = page.encode()
    assert write_study_report(study).html_path.read_bytes() == again


def test_cells_of_few_items_are_hatched_and_not_coloured():
    def cells(n: int):
        part = {"n": n, "mean": 0.5, "low": 0.5, "high": 0.5}
        return [{"level": "1", "splits": {"test": {"by_level": {"1": part}, "mean_over_levels": None}}}]

    few, many = (heat_map(cells(n), split="test", scale=(0.0, 1.0), name="m") for n in (29, 30))
    assert "<pattern" in few and "<pattern" not in many
    fills = [set(re.findall(r"fill: (#[0-9a-f]{6})", svg)) for svg in (few, many)]
    assert len(fills[1] - fills[0]) == 1, "one colour more: that of the only cell"


def test_folders_that_are_no_study_or_can_not_be_compared_are_refused(study, tmp_path):
    assert is_study(study) and not is_study(study / "mixed") and not is_study(tmp_path / "absent")
    write_run(study / "other", levels=[1], n=6, draw=0, right=set(), items=ITEMS[:-1])
    with pytest.raises(UserInputError, match="other: these runs were evaluated on different items"):
        write_study_report(study)
    empty = tmp_path / "empty" / "a"
    empty.mkdir(parents=True)
    (empty / "recipe.yaml").write_text(json.dumps({}))
    with pytest.raises(UserInputError, match="no finished run of a study"):
        write_study_report(empty.parent)
