"""Whose a run folder is: a finished run can be scored anew; an attempt without a step claims nothing."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from launcher_commands import save, sftcore
from tiny import SUBJECTS, write_lines

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.fsio import read_json, read_jsonl
from sftcore.recipe import load_recipe
from sftcore.runs.claim import claim, record_seconds
from sftcore.stages.evaluate import evaluate
from sftcore.stages.prepare import probe
from sftcore.stages.train import train_recipe
from sftcore.stages.whole_run import is_finished, run_whole

RUN = Path("runs/tiny")


@pytest.fixture
def path(tiny_recipe) -> Path:
    return Path(save(tiny_recipe | {"train": {"epochs": 1}}))


def kept_recipe() -> dict:
    return yaml.safe_load((RUN / "recipe.yaml").read_text())


def touch(*names: str) -> None:
    for name in names:
        (RUN / name).parent.mkdir(parents=True, exist_ok=True)
        (RUN / name).touch()


def test_a_trained_run_is_evaluated_with_other_settings_and_items(path):
    result = train_recipe(load_recipe(path))
    weights = {file.name: file.read_bytes() for file in result.iterdir() if file.is_file()}
    assert evaluate(load_recipe(path))["tuned"]["n"] == 8
    environment = read_json(RUN / "environment.json")
    assert environment["train_seconds"] >= 0
    again = sftcore(
        "evaluate", str(path), "--set", "evaluate.batch_size=3", "--set", "train.hang_seconds=900"
    )
    assert again.returncode == 0 and "of 8 right" in again.stdout, again.stderr
    assert kept_recipe()["evaluate"]["batch_size"] == 3
    write_lines(Path("more.jsonl"), [*read_jsonl(Path("test.jsonl")), *read_jsonl(Path("train.jsonl"))[:2]])
    asked = ["data.test=[{format: facts, path: more.jsonl}]", "evaluate.few_shot=1", "checkpoint.keep=1"]
    found = evaluate(
        load_recipe(path, [*asked, "tracking.tensorboard=true", "checkpoint.save_every_steps=9"])
    )
    assert {name: scores["n"] for name, scores in found.items()} == {"base": 10, "tuned": 10, "fewshot": 10}
    assert {file.name: file.read_bytes() for file in result.iterdir() if file.is_file()} == weights
    assert read_json(RUN / "environment.json")["train_seconds"] == environment["train_seconds"]
    for change in ("train.lr=0.5", "data.template=qa-instruct", "batch.capacity=512"):
        with pytest.raises(UserInputError, match=r"holds results of a recipe with another") as refused:
            evaluate(load_recipe(path, [change]))
        assert "another name or --run DIR" in str(refused.value) and "delete" not in str(refused.value)
        assert f"evaluate RECIPE --run DIR --model {result}" in str(refused.value)


def test_items_of_another_test_set_do_not_take_the_levels_of_the_first(path):
    assert sftcore("probe", str(path)).returncode == 0
    train_recipe(load_recipe(path))
    facts = [{"relation": "P19", "subject": f"{name} II", "answers": ["Rome"]} for name in SUBJECTS[:8]]
    write_lines(Path("other.jsonl"), facts)  # without ids, which are their places
    other = load_recipe(path, ["data.test=[{format: facts, path: other.jsonl}]"])
    assert evaluate(other)["tuned"]["n"] == 8
    rows = read_jsonl(RUN / "eval/tuned/predictions.jsonl")
    assert not any("level" in row for row in rows), "none of them was probed"
    write_lines(Path("other.jsonl"), [{**fact, "id": f"f{i + 16}"} for i, fact in enumerate(facts)])
    with pytest.raises(UserInputError, match=r"memory levels belong to facts that the data has no more"):
        evaluate(other)
    assert {row.split for row in probe(load_recipe(path, ["data.test=[]"]))} == {"train"}, (
        "may be probed again"
    )


def test_held_out_data_count_until_the_weights_are_there(path):
    """Training leaves out what they ask: another test set is another plan, which no checkpoint resumes."""
    recipe = load_recipe(path)
    claim(RUN, recipe)
    touch("metrics.jsonl", "checkpoints/step-000003/COMMITTED")
    other = load_recipe(path, ["data.test=[]"])
    with pytest.raises(UserInputError, match=r"another data.test") as refused:
        claim(RUN, other)
    assert "once the weights are there" in str(refused.value)
    before = (RUN / "recipe.yaml").read_bytes()
    with pytest.raises(UserInputError, match=r"another train.lr"):
        claim(RUN, load_recipe(path, ["train.lr=0.5", "evaluate.batch_size=2"]))
    assert (RUN / "recipe.yaml").read_bytes() == before
    claim(RUN, load_recipe(path, ["evaluate.batch_size=2", "tracking.to=trackio"]))
    assert kept_recipe()["evaluate"]["batch_size"] == 2
    recipe.result_folder.mkdir()
    claim(RUN, other)
    assert kept_recipe()["data"]["test"] == []


@pytest.mark.parametrize(
    ("change", "is_bound"),
    [("probe.samples=4", True), ("seed=4", True), ("train.lr=0.5", False), ("data.test=[]", False)],
)
def test_levels_depend_on_the_probe_not_on_training(path, change, is_bound):
    claim(RUN, load_recipe(path))
    touch("levels.jsonl", "selection.jsonl")
    if is_bound:
        with pytest.raises(UserInputError, match=change.partition("=")[0]):
            claim(RUN, load_recipe(path, [change]))
    else:
        claim(RUN, load_recipe(path, [change]))


def test_another_teacher_is_no_other_run(path):
    claim(RUN, load_recipe(path, ["matching.teacher.model=small"]))
    touch("metrics.jsonl", "checkpoints/step-000001")
    claim(RUN, load_recipe(path, ["matching.teacher.model=large", "matching.teacher.concurrency=2"]))
    assert kept_recipe()["matching"]["teacher"]["concurrency"] == 2


def test_an_attempt_that_ended_before_its_first_step_claims_nothing(path):
    """As an out-of-memory rehearsal leaves it: its hint says which key to change."""
    recipe = load_recipe(path)
    claim(RUN, recipe)
    touch("plan.json", "selection.jsonl", "lease.json", "ledger.valid.jsonl", "logs/rank-1.log")
    (RUN / "tensorboard").mkdir()
    (RUN / "checkpoints").mkdir()
    claim(RUN, load_recipe(path, ["train.activation_checkpointing=full"]))
    assert kept_recipe()["train"]["activation_checkpointing"] == "full"
    touch("metrics.jsonl")
    with pytest.raises(UserInputError, match=r"another train.activation_checkpointing"):
        claim(RUN, recipe)


def test_a_whole_run_is_scored_anew_under_other_settings_but_not_over_other_data(path):
    def with_batch(size: int) -> Recipe:
        return load_recipe(path, [f"evaluate.batch_size={size}"])

    run_whole(with_batch(8))
    steps = (RUN / "metrics.jsonl").read_bytes()
    assert is_finished(with_batch(8)) and not is_finished(with_batch(4))
    run_whole(with_batch(4))
    assert is_finished(with_batch(4)) and (RUN / "metrics.jsonl").read_bytes() == steps
    evaluate(with_batch(2))
    assert not is_finished(with_batch(4)), "its scores were made with other settings"
    run_whole(with_batch(4))
    assert is_finished(with_batch(4)) and is_finished(
        load_recipe(path, ["evaluate.batch_size=4", "checkpoint.keep=9"])
    )
    write_lines(Path("train.jsonl"), read_jsonl(Path("train.jsonl"))[1:])
    for size in (4, 8):
        with pytest.raises(UserInputError, match=r"finished with other data"):
            run_whole(with_batch(size))


def test_a_finished_run_without_its_weights_keeps_its_scores(path):
    """As a study leaves it: under other settings only the base model would be scored anew."""
    recipe = load_recipe(path)
    run_whole(recipe)
    shutil.rmtree(recipe.result_folder)
    with pytest.raises(UserInputError, match=r"another evaluate.batch_size"):
        evaluate(load_recipe(path, ["evaluate.batch_size=2"]))
    with pytest.raises(UserInputError, match=r"finished with"):
        run_whole(load_recipe(path, ["evaluate.batch_size=2"]))


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_notes_on_the_machine_that_are_damaged_are_written_again(tmp_path, caplog, content):
    (tmp_path / "environment.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        record_seconds(tmp_path, "train", 1.25)
    assert "environment.json is damaged: written again" in caplog.text
    notes = json.loads((tmp_path / "environment.json").read_text())
    assert notes["train_seconds"] == 1.2 and "python" in notes
