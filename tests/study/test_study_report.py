"""A study's page follows from its runs' predictions: cells, diagonal and best set by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, read_jsonl, write_json, write_jsonl
from sftcore.study.qa_study import best_cell, recommend, summarise_study
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
    folder: Path,
    *,
    levels: list[int],
    n: int,
    draw: int,
    right,
    items=ITEMS,
    balance: str = "relation",
    settings: dict | None = None,
    fingerprint: str = "aa",
) -> None:
    folder.mkdir(parents=True)
    select = {"levels": levels, "n": n, "draw": draw, "balance": balance}
    recipe = {"name": folder.name, "run": str(folder), "model": {"path": "/models/small"}, "select": select}
    recipe |= {"train": {"lr": 1e-5}, **(settings or {})}
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
    write_json(folder / "eval" / "drift.json", {"level": 1, "n": 3, "mean_kl_nats": 0.5 + draw})
    write_jsonl(folder / "levels.jsonl", [{"id": "x", "level": 2, "split": "train"}])
    write_json(folder / "levels.manifest.json", {"templates": 4, "model_fingerprint": fingerprint})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    for level in (1, 2):
        for draw in (0, 1):
            name = f"levels-{level}_draw-{draw}"
            write_run(folder / name, levels=[level], n=6, draw=draw, right=right_of(level, draw))
    write_run(folder / "mixed", levels=[0, 1, 2, 3, 4], n=6, draw=0, right=set())
    (folder / "started").mkdir()
    (folder / "started" / "recipe.yaml").write_text("{}")
    return folder


def test_cells_are_means_over_draws(study):
    report = summarise_study(read_study_runs(study))
    cells = {cell["level"]: cell for cell in report["cells"]}
    one = cells["1"]["splits"]["test"]
    assert one["by_level"]["1"] == {"n": 40, "mean": 0.5125, "low": 0.5, "high": 0.525, "draws": [0.5, 0.525]}
    assert one["by_level"]["2"]["mean"] == 0 and one["by_level"]["2"]["n"] == 20
    assert one["mean_over_large_levels"]["draws"] == [0.5, 0.525], "level 2 has 20 items: too few"
    assert one["levels_counted"] == [1]
    scores = next(run.scores for run in read_study_runs(study).runs if run.name == "levels-1_draw-0")
    assert scores["mean_over_levels"] == 0.25 and "mean_over_levels" not in str(report), "of both levels"
    two = cells["2"]["splits"]["test"]
    assert two["mean_over_large_levels"]["draws"] == [0.25, 0.25] and cells["2"]["splits"]["ood"]["n"] == 5
    assert (
        report["drift_levels"] == [1]
        and cells["1"]["drift_nats"] == 1.0
        and cells["mixed"]["runs"] == ["mixed"]
    )
    assert report["unfinished"] == {"started": "no selection.jsonl, eval/tuned/predictions.jsonl"}
    assert report["others"]["base"]["test"]["mean_over_large_levels"] == 0


def test_a_set_divided_among_levels_has_a_row_of_its_own(study):
    before = summarise_study(read_study_runs(study))
    write_run(study / "divided", levels=[0, 1, 2, 3, 4], n=6, draw=0, right=set(), balance="level")
    report = summarise_study(read_study_runs(study))
    assert {cell["level"] for cell in report["cells"]} == {"1", "2", "mixed", "divided"}
    assert report["diagonal"] == before["diagonal"], "it is of no single level"
    write_study_report(study)
    page = (study / "report.html").read_text(encoding="utf-8")
    assert "6 facts of divided levels" in page and ">level divided<" not in page


def test_runs_of_other_settings_are_no_draws(tmp_path):
    for draw in (0, 1):
        for lr, num_right in ((2e-5, 4), (5e-5, 30)):
            right = {("test", i) for i in range(num_right)}
            name = tmp_path / f"lr-{lr}_draw-{draw}"
            write_run(name, levels=[1], n=6, draw=draw, right=right, settings={"train": {"lr": lr}})
    report = summarise_study(read_study_runs(tmp_path))
    found = {c["variant"]: c["splits"]["test"]["by_level"]["1"]["draws"] for c in report["cells"]}
    assert found == {"train.lr 2e-05": [0.1, 0.1], "train.lr 5e-05": [0.75, 0.75]}
    assert report["best"]["variant"] == "train.lr 5e-05"
    assert "train on 6 facts of level 1 (train.lr 5e-05): 75.0 %" in report["verdict"][0]
    page = write_study_report(tmp_path).html_path.read_text(encoding="utf-8")
    assert "6 training facts, in domain, train.lr 2e-05" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_an_adapter_is_named_first_and_a_recipe_that_lacks_a_key_is_no_other_variant(tmp_path):
    lora = {"adapter": {"kind": "lora"}, "train": {"lr": 2e-4}, "tracking": {"to": None}}
    write_run(tmp_path / "a", levels=[1], n=6, draw=0, right=set(), settings=lora)
    write_run(tmp_path / "b", levels=[1], n=6, draw=0, right=set(), settings={"train": {"lr": 1e-5}})
    write_run(tmp_path / "c", levels=[1], n=6, draw=1, right=set(), settings={"train": {"lr": 1e-5}})
    cells = summarise_study(read_study_runs(tmp_path))["cells"]
    assert {cell["variant"]: cell["runs"] for cell in cells} == {
        "lora, train.lr 0.0002": ["a"],
        "train.lr 1e-05": ["b", "c"],
    }


def test_sets_of_other_levels_are_cells_of_their_own(study):
    write_run(study / "known", levels=[1, 2, 3, 4], n=6, draw=0, right=right_of(2, 0))
    report = summarise_study(read_study_runs(study))
    cells = {cell["level"]: cell["runs"] for cell in report["cells"]}
    assert cells["mixed"] == ["mixed"] and cells["mixed 1-4"] == ["known"]
    assert [effect["level"] for effect in report["diagonal"]] == [1], (
        "a set of several levels has no diagonal"
    )
    page = write_study_report(study).html_path.read_text(encoding="utf-8")
    assert "6 facts of mixed levels 1-4" in page and "6 facts of mixed levels<" in page


def test_runs_of_another_base_model_are_refused(study):
    write_run(study / "other", levels=[1], n=6, draw=2, right=set(), fingerprint="bb")
    with pytest.raises(UserInputError, match=r"(?s)different base models.*bb: other") as caught:
        write_study_report(study)
    assert len(caught.value.problems) == 1


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
    assert "don't tell 6 facts of level 1 apart from 6 facts of level 2 (" in doubtful["verdict"][1]


def one_cell(n: int, level: str, *draws: float) -> dict:
    spread = {"mean": sum(draws) / len(draws), "low": min(draws), "high": max(draws), "draws": draws}
    part = {"mean_over_large_levels": spread, "levels_counted": [0, 1]}
    keys = {"adapter": "none", "variant": "", "n": n, "level": level, "runs": [f"{n}-{level}"] * len(draws)}
    return keys | {"splits": {"test": part}}


def test_every_set_whose_draws_reach_the_best_is_named_and_the_smallest_is_recommended():
    """The second by mean is far from the best, the third has a draw in between: means alone would miss it."""
    best = one_cell(960, "mixed", 0.32, 0.31)
    close, apart = one_cell(240, "0", 0.315, 0.25), one_cell(960, "0", 0.305, 0.304)
    found = best_cell([apart, close, best])
    assert (found["n"], found["next"]["n"], found["is_clear"]) == (960, 960, False)
    assert [(rival["n"], rival["level"]) for rival in found["rivals"]] == [(240, "0")]
    first, second = recommend(found)
    assert first.startswith(
        "For this model, train on 240 facts of level 0: 28.2 %. The highest mean is that of"
    )
    assert "960 facts of mixed levels, 31.5 % (mean over test levels 0 and 1, 2 draws)" in first
    assert second.endswith("apart from 240 facts of level 0 (28.2 %).")


def test_sets_as_large_as_the_best_are_named_but_not_preferred():
    found = best_cell(
        [one_cell(60, "1", 0.4, 0.3), one_cell(60, "0", 0.31, 0.3), one_cell(240, "0", 0.3, 0.3)]
    )
    assert [(rival["n"], rival["level"]) for rival in found["rivals"]] == [(60, "0"), (240, "0")]
    first, second = recommend(found)
    assert first.startswith("For this model, train on 60 facts of level 1: 35.0 % (")
    assert second.endswith("apart from 60 facts of level 0 (30.5 %) and 240 facts of level 0 (30.0 %).")


def test_one_draw_makes_no_set_clear():
    found = best_cell([one_cell(60, "1", 0.4), one_cell(60, "0", 0.3, 0.2)])
    assert not found["is_clear"] and not found["rivals"]
    assert "One draw is too few to tell it apart from 60 facts of level 0" in recommend(found)[1]


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
        return [{"level": "1", "splits": {"test": {"by_level": {"1": part}, "mean_over_large_levels": None}}}]

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


def test_a_study_says_what_the_constant_answer_explains(tmp_path):
    """30 of 60 items are of P17, whose trained answer is right; the first model gets 21 of 60 right."""
    right = {("test", i) for i in range(21)}
    for level in (1, 2):
        folder = tmp_path / f"run-{level}"
        write_run(folder, levels=[level], n=2, draw=0, right=right if level == 1 else right | {("test", 59)})
        answers = {"relation": "P17", "level": level, "answers": ["Oslo"]}
        write_jsonl(folder / "selection.jsonl", [{"id": "a", **answers}, {"id": "b", **answers}])
        for model in ("tuned", "base"):
            file = folder / "eval" / model / "predictions.jsonl"
            write_jsonl(file, [row | {"answers": ["Oslo"]} for row in read_jsonl(file)])
    report = read_json(write_study_report(tmp_path).json_path)
    constant = report["cells"][0]["splits"]["test"]["constant"]
    assert constant["accuracy"]["draws"] == [0.5]
    assert constant["over"]["difference"] == pytest.approx((21 - 30) / 60)
    assert [part["clear"] for part in report["explained"]] == [False, False]
    assert "0 of 2 training sets are clearly above their own constant" in report["verdict"][-1]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Always answering with the relation" in page and "-15.0 [" in page
