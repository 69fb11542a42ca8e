"""What must hold for a report: numbers one can count again, nothing unescaped or silent, the same bytes."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, write_jsonl
from sftcore.study.report import pick_examples, write_report
from sftcore.study.run_folder import FILES

EVIL = "<script>alert('x')</script>"  # stands in a prompt, in predictions and in subjects of the fake run


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, ids, links and text."""

    VOID = ("meta", "col", "br", "wbr", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"event handler {name}"
            self.ids += [value or ""] if name == "id" else []
            self.references += [value or ""] if name in ("href", "src", "xlink:href") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_numbers_by_hand(fake: Any) -> None:
    report = fake.report()
    assert (report["n"], report["acc_base"], report["acc_tuned"]) == (40, 4 / 40, 16 / 40)
    assert report["by_level"]["1"] | {"low_base": 0, "high_base": 0, "low_tuned": 0, "high_tuned": 0} == {
        "n": 20,
        "acc_base": 3 / 20,
        "acc_tuned": 2 / 20,
        "low_base": 0,
        "high_base": 0,
        "low_tuned": 0,
        "high_tuned": 0,
    }
    assert report["by_level"]["3"]["acc_tuned"] == 14 / 20
    assert report["mean_over_levels"] == {
        "base": pytest.approx((0.15 + 0.05) / 2),
        "tuned": pytest.approx((0.1 + 0.7) / 2),
        "levels_counted": [1, 3],
    }
    change = report["paired_change"]
    assert {key: change[key] for key in ("both_right", "gained", "lost", "both_wrong")} == {
        "both_right": 3,
        "gained": 13,
        "lost": 1,
        "both_wrong": 23,
    }
    assert change["p_value"] == 2 * (1 + 14) / 2**14
    assert report["ood"]["n"] == 4 and report["ood"]["acc_tuned"] == 0.0
    assert report["level_histogram"]["train"] == {"0": 3, "1": 3, "2": 2, "3": 2, "4": 2}
    assert report["level_histogram"]["test"]["4"] == 1
    assert report["selection"] == {"n": 2, "by_level": {"2": 2}, "by_relation": {"P17": 1}, "by_label": {}}
    training = report["training"]
    assert (training["num_steps"], training["first_loss"], training["last_loss"]) == (5, 3.5, 1.5)
    assert (training["num_tokens"], training["num_trained_tokens"], training["seconds"]) == (50, 10, 5)
    assert report["missing"] == [] and report["settings"] == fake.recipe


def test_every_number_names_a_file_that_is_there(run: Path, fake: Any) -> None:
    report = fake.report()
    for key, file in report["sources"].items():
        assert list(run.glob(file)), (key, file)
    answered = {key.split(".")[0] for key in report["sources"]}
    assert answered >= {
        "acc_base",
        "acc_tuned",
        "by_level",
        "paired_change",
        "level_histogram",
        "training",
        "plan",
    }


def test_the_page_is_whole_escaped_and_self_contained(run: Path) -> None:
    html = write_report(run).html_path.read_text(encoding="utf-8")
    page = Page(html)
    assert EVIL not in html and html.count("&lt;script&gt;alert") > 2
    assert "script" not in page.tags and page.tags.count("svg") == 4
    assert "http://" not in html and "https://" not in html and "url(#" in html
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)
    assert "tiny & small" in page.text and "smollm2-135m" in page.text and "东京" in page.text
    assert "[object" not in html and "Undefined" not in html


def test_the_same_folder_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    first, second = write_report(run), write_report(tmp_path / "copy")
    assert first.html_path.read_bytes() == second.html_path.read_bytes()
    assert first.json_path.read_bytes() == second.json_path.read_bytes() and first.table == second.table
    again = write_report(run)  # its own output in the folder changes nothing
    assert again.html_path.read_bytes() == second.html_path.read_bytes()


def test_report_json_is_plain_json(run: Path) -> None:
    text = write_report(run).json_path.read_text(encoding="utf-8")
    constants: list[str] = []  # NaN and infinities, which are not JSON
    assert json.loads(text, parse_constant=constants.append)["n"] > 0
    assert constants == []


@pytest.mark.parametrize("file", FILES)
def test_any_one_file_may_be_absent_and_is_said_to_be(run: Path, file: str) -> None:
    (run / file).unlink()
    result = write_report(run)
    assert read_json(result.json_path)["missing"] == [file] and f"not in this folder: {file}" in result.table
    page = Page(result.html_path.read_text(encoding="utf-8"))
    assert "missing" in page.ids and file in page.text


def test_only_training(run: Path, fake: Any) -> None:
    for file in FILES:
        if file != "metrics.jsonl":
            (run / file).unlink()
    report = fake.report()
    assert report["verdict"] == ["Trained for 5 steps; the loss went from 3.500 to 1.500. Not evaluated yet."]
    assert (report["n"], report["acc_base"], report["by_level"], report["ood"]) == (0, None, {}, None)
    assert report["sources"] == {"training": "metrics.jsonl", "settings": "recipe.yaml"}
    html = (run / "report.html").read_text(encoding="utf-8")
    assert Page(html).tags.count("svg") == 1 and "Predictions before" not in html


def test_only_a_recipe_and_an_unnamed_one(run: Path, fake: Any) -> None:
    for file in FILES:
        (run / file).unlink()
    (run / "recipe.yaml").write_text("model: {path: org/name}\n", encoding="utf-8")
    report = fake.report()
    assert report["verdict"] == ["Neither trained nor evaluated yet."]
    assert (report["name"], report["model"], report["missing"]) == ("run", "org/name", list(FILES))


def test_only_the_tuned_model_evaluated(run: Path, fake: Any) -> None:
    shutil.rmtree(run / "eval" / "base")
    report = fake.report()
    assert report["acc_base"] is None and report["acc_tuned"] == 0.4 and report["paired_change"] is None
    assert report["verdict"][0].startswith("Accuracy on 40 held-out facts after training: 40.0 %")
    assert "acc_base" not in report["sources"] and "paired_change" not in report["sources"]
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "not evaluated" in page.text


def test_text_matching_counts_pairs_and_needs_no_levels(run: Path, fake: Any) -> None:
    fake.write_recipe({"task": "matching"})
    for model, right in (("base", {0}), ("tuned", {0, 1})):
        rows = [{**fake.prediction(i, correct=i in right, level=1), "label": "相同"} for i in range(4)]
        bare = [{k: v for k, v in row.items() if k not in ("level", "relation", "answers")} for row in rows]
        fake.write_evaluation(model, bare)
    report = fake.report()
    assert (
        report["by_level"] == {}
        and report["by_relation"] == {}
        and "4 held-out pairs" in report["verdict"][0]
    )
    assert "相同" in (run / "report.html").read_text(encoding="utf-8")
    assert not any("no memory level" in note for note in report["notes"])


def test_evaluations_of_other_items_or_levels_are_refused(run: Path, fake: Any) -> None:
    fake.write_evaluation("tuned", fake.predictions({0})[1:])
    with pytest.raises(
        UserInputError, match=r"eval/base/predictions\.jsonl and eval/tuned/predictions\.jsonl: .*diff"
    ):
        write_report(run)
    rows = fake.predictions({0})
    fake.write_evaluation("tuned", [rows[0] | {"level": 4}, *rows[1:]])
    with pytest.raises(UserInputError, match=r"split test, by_level 1: .*disagree"):
        write_report(run)


def test_examples_show_each_outcome_and_fill_up_to_eight(fake: Any) -> None:
    before, after = (
        fake.predictions({0, 1, 2, 20})[:40],
        fake.predictions({0, 1, 20} | set(range(21, 34)))[:40],
    )
    outcomes = [example["outcome"] for example in pick_examples(before, after)]
    assert outcomes == ["gained"] * 4 + ["lost"] + ["both right"] + ["both wrong"] * 2
    prompts = [example["prompt"] for example in pick_examples(before, after)]
    assert len(set(prompts)) == 8
    alone = pick_examples([], after)
    assert [example["outcome"] for example in alone] == ["right"] * 4 + ["wrong"] * 4
    assert alone[0]["base"] is None and pick_examples([], []) == []


def test_a_page_says_what_the_constant_answer_explains(run: Path, fake: Any) -> None:
    """All 40 items are Oslo's; half are of the one relation that was trained: 20 without a model."""
    answers = {"relation": "P17", "level": 2, "answers": ["Oslo"]}
    write_jsonl(run / "selection.jsonl", [{"id": "2", **answers}, {"id": "7", **answers}])
    constant = fake.report()["constant"]
    assert (constant["n"], constant["correct"], constant["by_level"]["1"]["correct"]) == (40, 20, 10)
    assert (
        constant["by_relation"]["P131"]["accuracy"] == 0 and constant["by_relation"]["P17"]["accuracy"] == 1
    )
    assert constant["over"]["difference"] == pytest.approx((16 - 20) / 40)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "most frequent training answer gets 50.0" in page.replace("\xa0", " ")
    assert "not clearly more than the constant" in page
