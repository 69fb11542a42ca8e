"""A study of text matching: cells, comparisons and prices follow from its runs' predictions, by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, write_json, write_jsonl
from sftcore.study.matching_study import describe_arm, summarise_matching
from sftcore.study.study_report import write_study_report

NUM_ITEMS = 40


def write_run(
    folder: Path,
    *,
    right: int,
    n: int = 100,
    draw: int = 0,
    few_shot: bool = False,
    items: int = NUM_ITEMS,
    **matching,
) -> None:
    """A run that judges the first `right` test pairs rightly; the larger class has half of them."""
    folder.mkdir(parents=True)
    recipe = {
        "name": folder.name,
        "task": "matching",
        "model": {"path": "/models/small"},
        "adapter": {"kind": "none"},
        "matching": {"mode": "generative", "prompt": "concise", "wording": 0, "rationale": "none"} | matching,
        "select": {"n": n, "draw": draw},
        "train": {"epochs": 2},
        "evaluate": {"few_shot": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    write_jsonl(folder / "selection.jsonl", [{"id": str(i), "label": i % 2} for i in range(n)])
    steps = [
        {"step": i, "loss": 1.0, "num_tokens": 10 * n, "num_samples": n, "elapsed_seconds": i * 3.5}
        for i in (1, 2)
    ]
    write_jsonl(folder / "metrics.jsonl", steps)
    models = {"tuned": right} | ({"base": 18, "fewshot": 22} if few_shot else {})
    for model, count in models.items():
        rows = [
            {"id": f"p{i}", "prompt": "<b>", "prediction": "x", "split": "test", "correct": i < count}
            for i in range(items)
        ]
        noted = {
            "n": items,
            "unparsable": 4,
            "majority_accuracy": 0.5,
            "predicted_same": 0.25,
            "gold_same": 0.5,
        }
        write_jsonl(folder / "eval" / model / "predictions.jsonl", rows)
        write_json(folder / "eval" / model / "scores.json", {"pairs": {"test": noted}})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    for draw, right in enumerate((30, 34)):
        write_run(folder / f"g{draw}", right=right, draw=draw, few_shot=draw == 0)
        write_run(folder / f"d{draw}", right=20, draw=draw, mode="discriminative")
    write_run(folder / "paraphrase", right=26, wording=2)
    write_run(folder / "reasons", right=10, n=60, rationale="before", prompt="complex")
    (folder / "started").mkdir()
    (folder / "started" / "recipe.yaml").write_text("task: matching")
    (folder / "left").mkdir()
    (folder / "left" / "recipe.yaml").write_text("task: matching")
    write_json(folder / "left" / "not_run.json", {"reason": "7 pairs with reasons, 100 are needed"})
    return folder


def test_cells_have_accuracy_and_cost(study):
    report = summarise_matching(study)
    cells = {(cell["arm"], cell["n"], cell["wording"]): cell for cell in report["cells"]}
    first = cells["generative, concise prompt", 100, 0]
    assert first["accuracy"] == {"mean": 0.8, "low": 0.75, "high": 0.85, "draws": [0.75, 0.85]}
    assert first["tokens_per_sample"] == 10 and first["trained_tokens"] == 2000
    assert first["tokens_per_point"] == pytest.approx(2000 / 30) and first["train_seconds"] == 7.0
    assert first["unparsable"] == 0.1 and first["predicted_same"] == 0.25
    assert cells["discriminative, concise prompt", 100, 0]["tokens_per_point"] is None, "no point was gained"
    assert cells["generative, complex prompt, reason before the label", 60, 0]["is_too_small"]
    assert report["unfinished"].keys() == {"started", "left"} and report["num_runs"] == 6
    page = write_study_report(study)
    for text in (page.table, page.html_path.read_text(encoding="utf-8")):
        assert re.search(r"left.{2}not run: 7 pairs with reasons, 100 are needed", text)
    names = {part["name"]: part["accuracy"] for part in report["references"]}
    assert names == {
        "larger class of the test set": 0.5,
        "base model (generative, concise prompt)": 0.45,
        "base model, 2 solved examples (generative, concise prompt)": 0.55,
    }


def test_arms_are_compared_pair_by_pair(study):
    (part,) = summarise_matching(study)["comparisons"]
    assert (part["n"], part["first"], part["second"]) == (
        100,
        "discriminative, concise prompt",
        "generative, concise prompt",
    )
    differences = [0.0] * 20 + [-1.0] * 10 + [-0.5] * 4 + [0.0] * 6
    mean = sum(differences) / NUM_ITEMS
    deviation = (sum((d - mean) ** 2 for d in differences) / (NUM_ITEMS - 1)) ** 0.5
    assert part["difference"] == pytest.approx(mean)
    assert part["high"] - part["low"] == pytest.approx(2 * 1.96 * deviation / NUM_ITEMS**0.5)
    verdict = " ".join(summarise_matching(study)["verdict"])
    assert "Best: generative, concise prompt, 100 pairs: 80.0 % (2 draws)" in verdict
    assert "generative, concise prompt is ahead of discriminative, concise prompt by 30.0 points" in verdict
    assert "Paraphrasing the prompt moves the result by up to 15.0 points" in verdict


def test_runs_that_differ_elsewhere_are_arms_of_their_own(study):
    path = study / "g1" / "recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 4"), encoding="utf-8")
    arms = {cell["arm"] for cell in summarise_matching(study)["cells"]}
    assert {
        "generative, concise prompt, train.epochs 2",
        "generative, concise prompt, train.epochs 4",
    } <= arms
    assert describe_arm({"matching.mode": "encoder", "adapter.kind": "none"}) == "encoder"
    assert describe_arm({"matching.mode": "discriminative", "adapter.kind": "lora"}).endswith(", lora")


def test_the_page_holds_the_numbers_and_nothing_unescaped(study):
    result = write_study_report(study)
    page = result.html_path.read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "<b>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert (
        "80.0 %" in page and "0: 80.0 % · 2: 65.0 %" in page and "started" in page and 'class="few"' in page
    )
    assert read_json(result.json_path)["num_items"] == NUM_ITEMS
    assert "80.0 %" in result.table and "not finished: started" in result.table
    again = page.encode()
    assert write_study_report(study).html_path.read_bytes() == again


def test_runs_on_other_pairs_are_refused(study):
    write_run(study / "other", right=3, items=NUM_ITEMS - 1)
    with pytest.raises(
        UserInputError, match="g0 and other: these runs were evaluated on different|different items"
    ):
        write_study_report(study)
