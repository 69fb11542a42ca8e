"""Debugging in one process: the first bad tensor is named, a step is learned, a trace is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import BIN, run, steps, weights_hash, write_recipe

from sftcore.data.tokens import Codec
from sftcore.errors import TrainingFailed, UserInputError
from sftcore.fsio import read_jsonl
from sftcore.recipe import load_recipe
from sftcore.stages import train as training
from sftcore.stages.train import overfit_recipe
from sftcore.train.observers import REHEARSAL, DebugOptions, NormRecorder, observing
from sftcore.train.overfit import check_overfit


@pytest.mark.slow
def test_stopping_after_some_steps_and_looking_closely_change_no_number(tiny_recipe):
    """Three steps with norms and a trace, then the rest: the weights of a run that nobody looked at."""
    whole, looked = (write_recipe(tiny_recipe, name) for name in ("whole", "looked"))
    assert run(str(BIN / "sftcore"), "train", str(whole)).returncode == 0
    options = ("--debug-anomaly", "--profile", "--max-steps", "3")
    first = run(str(BIN / "sftcore"), "train", str(looked), *options)
    assert first.returncode == 0 and "after step 3" in first.stdout, first.stderr[-3000:]
    assert len(steps("looked")) == 3 and "Self CPU" in first.stderr
    folder = Path("runs/looked/debug")
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    norms = [json.loads(line) for line in (folder / "norms.jsonl").read_text().splitlines()]
    assert [row["step"] for row in norms] == [1, 2, 3]
    gradients = norms[0]["gradients"].values()
    assert len(gradients) > 10 and all(value > 0 for value in gradients)
    total = sum(value**2 for value in gradients) ** 0.5
    assert total == pytest.approx(steps("looked")[0]["grad_norm"], rel=1e-3)
    assert run(str(BIN / "sftcore"), "train", str(looked)).returncode == 0
    assert weights_hash("looked") == weights_hash("whole")


def test_one_step_is_learned_or_the_reason_is_told(tiny_recipe, monkeypatch):
    recipe = load_recipe(write_recipe(tiny_recipe, "one"))
    said = overfit_recipe(recipe)
    assert "it can be learned" in said and not Path("runs/one").exists()
    monkeypatch.setattr("sftcore.train.overfit.OVERFIT_STEPS", 2)
    with pytest.raises(TrainingFailed, match=r"step 1 was not learned: loss \d.* in 2 repetitions"):
        overfit_recipe(recipe)
    smooth = load_recipe(write_recipe(tiny_recipe, "smooth", train={"label_smoothing": 0.1, "z_loss": 0.1}))
    with pytest.raises(UserInputError, match=r"(?s)label_smoothing.*z_loss"):
        check_overfit(smooth.train)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_first_tensor_that_is_not_finite_is_named(where, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    norms = NormRecorder(model, tmp_path)
    if where == "forward":
        model[2].weight.data[0, 1] = float("nan")
        with pytest.raises(RuntimeError, match=r"the output of 2, shape \(4, 1\)"):
            model(torch.ones(4, 2))
        return
    (model(torch.ones(4, 2)).sum() * float("inf")).backward()
    assert norms.first_bad == "the gradient of 2.bias, shape (1,)"
    norms.close()
    norms.first_bad = ""
    model(torch.full((4, 2), float("nan")))
    assert norms.first_bad == ""


def test_the_rehearsal_is_looked_at_too(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[1].weight.data[0, 1] = float("nan")
    with observing(DebugOptions(anomaly=True), model, tmp_path) as observers:
        (observer,) = observers
        with pytest.raises(TrainingFailed, match=r"first tensor that is not finite: the output of 1"):
            with observer(REHEARSAL):
                model(torch.ones(4, 2))
        model[1].weight.data[0, 1] = 0.0
        observers[0].first_bad = ""
        for step in (REHEARSAL, 7):
            with observer(step):
                model(torch.ones(4, 2))
    assert [row["step"] for row in read_jsonl(tmp_path / "debug/norms.jsonl")] == [7]


def test_debugging_options_are_for_one_process(tiny_recipe):
    path = str(write_recipe(tiny_recipe, "r"))
    done = run(str(BIN / "sftcore"), "train", path, "--on", "node", "--ranks-per-node", "2", "--profile")
    assert done.returncode == 2 and "--profile: not with --on node" in done.stderr


def test_nothing_is_tokenised_after_ranks_have_met(tiny_recipe, monkeypatch):
    """Ranks that wait in a collective while one tokenises run into its timeout."""
    join, stores = training.init_process_group, []

    def join_and_forbid() -> None:
        stores.extend(Path(".cache/stores").glob("*/manifest.json"))
        join()
        monkeypatch.setattr(Codec, "encode", None)

    monkeypatch.setattr(training, "init_process_group", join_and_forbid)
    training.train_recipe(load_recipe(write_recipe(tiny_recipe, "late", train={"epochs": 1})))
    assert len(stores) == 1 and Codec.encode is None and len(steps("late")) == 4
