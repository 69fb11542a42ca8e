"""Optimizers, schedulers and trackers that a recipe can choose."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, run, run_cells, steps, weights, weights_hash, write_recipe
from transformers import AutoModelForCausalLM

from sftcore.config import Recipe, TrainSettings
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.train import optimizers
from sftcore.train.optimizers import make_optimizer, set_learning_rate
from sftcore.train.rates import learning_rate
from sftcore.train.tracking import RunTracker


class SimpleModel(torch.nn.Module):
    """A causal LM where a loss model has it."""

    def __init__(self, causal_lm: torch.nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm


EIGHT_BIT = {"optimizer": "adamw-8bit", "weight_decay": 0.1, "epochs": 2}


def test_eight_bit_adam_learns_as_adam_does_and_resumes_to_the_bit(tiny_recipe):
    """Moments are rounded to 8 bits in blocks of 256, of each rank's share: ranks agree to 1e-3 only."""
    save = {"checkpoint": {"save_every_steps": 3}}
    names = ("eight", "cut", "plain")
    eight, cut = (write_recipe(tiny_recipe, n, train=EIGHT_BIT, **save) for n in names[:2])
    plain = write_recipe(tiny_recipe, "plain", train={**EIGHT_BIT, "optimizer": "adamw"})
    two = write_recipe(tiny_recipe, "two", train=EIGHT_BIT, deepspeed="zero2")
    run_cells([eight, cut, plain], ranks=1)
    run_cells([two], ranks=2)
    for name in ("plain", "two"):
        for a, b in zip(steps("eight"), steps(name), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
    assert steps("eight")[-1]["loss"] < steps("eight")[0]["loss"]
    shutil.rmtree("runs/cut/model")
    for folder in Path("runs/cut/checkpoints").glob("step-000008"):
        shutil.rmtree(folder)
    run_cells([cut], ranks=1)
    assert weights_hash("cut") == weights_hash("eight")
    exact = weights("plain")
    assert not all(torch.equal(tensor, exact[name]) for name, tensor in weights("eight").items())


@pytest.mark.slow
def test_muon_learns_the_same_on_two_ranks_and_resumes_to_the_bit(tiny_recipe):
    train = {"optimizer": "muon", "lr": 2e-3, "weight_decay": 0.1, "epochs": 2}
    save = {"checkpoint": {"save_every_steps": 3}, "deepspeed": "zero0"}
    one, two, cut = (write_recipe(tiny_recipe, name, train=train, **save) for name in ("one", "two", "cut"))
    run_cells([one, cut], ranks=1)
    run_cells([two], ranks=2)
    assert steps("one")[-1]["loss"] < steps("one")[0]["loss"]
    for a, b in zip(steps("one"), steps("two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    shutil.rmtree("runs/cut/model")
    shutil.rmtree("runs/cut/checkpoints/step-000008")
    run_cells([cut], ranks=1)
    assert weights_hash("cut") == weights_hash("one")
    refused = write_recipe(tiny_recipe, "sharded", train=train, deepspeed="zero2")
    done = run(str(ROOT / ".venv/bin/sftcore"), "train", str(refused))
    assert done.returncode == 2 and "set deepspeed: zero0" in done.stderr


def test_a_muon_step_is_as_large_as_adams(tiny_model_folder):
    """0.2 lr in root mean square for every matrix of the layers; embeddings and norms are AdamW's."""
    model = SimpleModel(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, TrainSettings(optimizer="muon", lr=0.5, weight_decay=0.1))
    set_learning_rate(optimizer.param_groups, 0.01)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    try:
        optimizer.step()  # not compiled, as everywhere on CPUs: that gives NaN on AVX2
    finally:
        torch.compiler.set_stance("default")
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        change = (parameter.detach() - before[name] * (1 - 0.01 * decay)).square().mean().sqrt()
        is_hidden = parameter.ndim > 1 and "embed" not in name
        expected = 0.2 * 0.01 if is_hidden else 0.01
        assert change.item() == pytest.approx(expected, rel=0.25 if is_hidden else 1e-3), name


def eight_bit_groups(monkeypatch, **shapes: tuple[int, ...]) -> list[dict]:
    """Parameter groups that bitsandbytes' Adam is given for weights of these shapes, which take no memory."""
    model = torch.nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    optim = SimpleNamespace(AdamW8bit=lambda groups, **options: list(groups))
    monkeypatch.setattr(optimizers, "require_bitsandbytes", lambda where: SimpleNamespace(optim=optim))
    return make_optimizer(model, TrainSettings(optimizer="adamw-8bit", weight_decay=0.1))


def test_no_group_of_eight_bit_adam_is_longer_than_bitsandbytes_counts(monkeypatch):
    """DeepSpeed makes each group one tensor; with two groups a model of 8B would wrap the count around."""
    shapes = {f"m{n}": (2**15, 2**15) for n in range(3)} | {"norm": (8,), "m3": (2**15, 2**14)}
    groups = eight_bit_groups(monkeypatch, **shapes)
    sizes = [[p.numel() for p in group["params"]] for group in groups]
    assert sizes == [[2**30], [2**30], [2**30, 2**29], [8]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]
    small = eight_bit_groups(monkeypatch, matrix=(2, 3))
    assert [len(group["params"]) for group in small] == [1, 0]


def test_a_weight_too_large_for_eight_bit_adam_is_named(monkeypatch):
    with pytest.raises(
        UserInputError, match=r"(?s)kept for huge: .*2,147,483,648 elements.*adamw .deepspeed: zero2-offload"
    ):
        eight_bit_groups(monkeypatch, huge=(2**16, 2**15), fine=(2, 3))


@pytest.mark.slow
def test_eight_bit_state_is_refused_at_another_number_of_ranks(tiny_recipe):
    path = write_recipe(tiny_recipe, "moved", train=EIGHT_BIT, checkpoint={"save_every_steps": 3})
    run_cells([path], ranks=1)
    shutil.rmtree("runs/moved/model")
    with pytest.raises(AssertionError, match="8-bit optimizer state is quantised in blocks"):
        run_cells([path], ranks=2)


def test_wsd_warms_up_stays_and_falls_to_the_end():
    settings = TrainSettings(lr=1.0, scheduler="wsd", warmup_ratio=0.2, decay_ratio=0.3)
    rates = [learning_rate(step, 10, settings) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    with pytest.raises(ValueError, match="must not be over 1"):
        TrainSettings(scheduler="wsd", warmup_ratio=0.5, decay_ratio=0.6)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "wsd"])
def test_a_decay_ends_at_its_lowest_rate(scheduler):
    settings = TrainSettings(lr=2.0, scheduler=scheduler, min_lr_ratio=0.1, warmup_ratio=0.1, decay_ratio=0.5)
    rates = [learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[0] == 0.02 and max(rates) == 2.0 and rates[-1] == pytest.approx(0.2, rel=0.02)
    assert min(rates[100:]) >= 0.2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_betas_and_eps_reach_the_optimizer(tiny_model_folder, kind):
    model = SimpleModel(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    settings = TrainSettings(optimizer=kind, betas=[0.8, 0.95], eps=1e-6)
    groups = [g for g in make_optimizer(model, settings).param_groups if not g.get("use_muon")]
    assert groups and all((g["betas"], g["eps"]) == ((0.8, 0.95), 1e-6) for g in groups)
    with pytest.raises(ValueError, match="betas.1"):
        TrainSettings(betas=[0.9, 1.0])


def test_a_tracker_that_is_not_installed_is_refused_before_training(tiny_recipe):
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    path = write_recipe(tiny_recipe, "tracked", tracking={"to": "trackio"})
    done = run(str(ROOT / ".venv/bin/sftcore"), "train", str(path))
    assert done.returncode == 3 and "pip install trackio" in done.stderr
    assert not Path("runs/tracked/metrics.jsonl").exists()


def test_a_tracker_that_can_not_be_started_is_one_message(tiny_recipe, monkeypatch):
    """As wandb without a key: it raises an error of its own kind."""

    def refuse(**options: object) -> None:
        raise ValueError(f"No API key configured for {options['name']}")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    recipe = Recipe.model_validate(tiny_recipe | {"tracking": {"to": "wandb"}})
    with pytest.raises(MissingEnvironmentError, match="No API key configured for tiny\n.*WANDB_MODE=offline"):
        RunTracker("wandb", recipe)
