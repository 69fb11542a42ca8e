"""The engine: which GPU a rank takes, what it leaves behind, where the host waits for the device."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch

from sftcore import dist
from sftcore.batching.collate import UNTRAINED, Batch, collate
from sftcore.config import Recipe
from sftcore.data.prompts import Sample
from sftcore.model import ours
from sftcore.objectives import load_objective
from sftcore.recipe import deepspeed_file
from sftcore.train import engine as engine_module
from sftcore.train.ds_config import complete_ds_config, read_ds_config
from sftcore.train.engine import Engine, init_process_group

FLAT = {  # where DeepSpeed keeps a group's float32 masters
    "zero1": "fp32_groups_flat_partition",
    "zero2": "single_partition_of_fp32_groups",
    "zero3": "fp32_partitioned_groups_flat",
}


def make_recipe(tiny_recipe: dict, **changes) -> Recipe:
    model = tiny_recipe["model"] | {"dtype": "bfloat16"}
    return Recipe.model_validate(tiny_recipe | {"model": model} | changes)


def make_batch() -> Batch:
    ids = np.array([5, 6, 7, 8], np.int32)
    labels = np.array([6, 7, 8, UNTRAINED], np.int32)
    sample = Sample(id="a", input_ids=ids, labels=labels, num_trained=3)
    return collate([sample], normalise="token", num_trained_in_step=3, num_samples_in_step=1)


def test_a_rank_takes_its_gpu_before_it_meets_the_others(monkeypatch):
    """NCCL's collectives of objects use torch's current device: without it, all ranks GPU 0."""
    events: list[object] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(device))
    monkeypatch.setattr(engine_module.deepspeed, "init_distributed", lambda **o: events.append(o))
    init_process_group()
    assert events[0] == torch.device("cuda", 3)
    assert events[1]["dist_backend"] == "nccl" and isinstance(events[1]["timeout"], timedelta)


def test_one_rank_adds_nothing_up_on_the_device(monkeypatch):
    monkeypatch.setattr(dist, "device", lambda: pytest.fail("a round trip to the device"))
    assert dist.sums_and_maxima([1.5, 2.0], [3.0]) == ([1.5, 2.0], [3.0])


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_a_closed_engine_keeps_no_weight_master_or_gradient_alive(tiny_recipe, name, monkeypatch):
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)  # at stage 3 DeepSpeed puts its own there
    recipe = make_recipe(tiny_recipe, deepspeed=name)
    init_process_group()
    engine = Engine(load_objective(recipe), recipe, read_ds_config(deepspeed_file(recipe)))
    engine.step([make_batch()], seeds=[0], rates={"lr": 1e-3})
    model, update = engine.objective, engine.deepspeed.basic_optimizer
    kept = {"model": weakref.ref(model), "engine": weakref.ref(engine.deepspeed)}
    kept |= {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    for number, state in enumerate(update.state.values()):
        kept |= {f"{key} {number}": weakref.ref(t) for key, t in state.items() if torch.is_tensor(t)}
    flat = (engine.deepspeed.optimizer, FLAT.get(name, ""))
    kept |= {f"master {number}": weakref.ref(t) for number, t in enumerate(getattr(*flat, []))}
    assert len(kept) > 20 and ("master 1" in kept) == (name in FLAT)
    del model, update, state, flat
    engine.close()
    gc.collect()
    alive = {what: found for what, reference in kept.items() if (found := reference()) is not None}
    assert name == "zero3" or not alive  # there DeepSpeed caches modules, the weights of which are empty now
    assert [what for what, found in alive.items() if torch.is_tensor(found) and found.numel()] == []


def sums_after_two_packs(recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """The gradient's norm, and the float32 sums that the update saw."""
    engine = Engine(load_objective(recipe), recipe, read_ds_config(deepspeed_file(recipe)))
    optimizer, seen = engine.deepspeed.optimizer, {}
    names = {id(p): name for name, p in engine.objective.named_parameters()}

    def keep(*_) -> None:
        for group, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            seen.update({names[id(p)]: total.clone() for p, total in zip(group, sums, strict=True)})

    engine.deepspeed.basic_optimizer.register_step_pre_hook(keep)
    result = engine.step([make_batch(), make_batch()], seeds=[0, 1], rates={"lr": 1e-3})
    engine.close()
    return result.grad_norm, seen


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_what_is_added_in_place_is_what_deepspeed_would_add(tiny_recipe, monkeypatch, max_grad_norm):
    """A tied embedding's sum gets the head's products and the lookup's rows; norm and clip count them."""
    recipe = make_recipe(tiny_recipe, deepspeed="zero1", train={"max_grad_norm": max_grad_norm})
    init_process_group()
    norm, sums = sums_after_two_packs(recipe)
    monkeypatch.setattr(engine_module, "add_without_copies", lambda optimizer: False)
    monkeypatch.setattr(engine_module, "share_gradient", lambda model: False)
    monkeypatch.setattr(ours, "slim_norms", lambda model: 0)
    monkeypatch.setattr(ours, "slim_gates", lambda model: 0)
    expected_norm, expected = sums_after_two_packs(recipe)
    assert norm == pytest.approx(expected_norm, rel=1e-2)
    assert sums.keys() == expected.keys()
    for name, total in expected.items():
        assert total.abs().max() > 0
        assert (sums[name] - total).norm() <= 2e-2 * total.norm(), name


def test_deepspeeds_clock_is_off_unless_asked_for(tiny_recipe):
    recipe = make_recipe(tiny_recipe)
    assert complete_ds_config({}, recipe)["timers"] == {"throughput": {"enabled": False}}
    own = {"throughput": {"enabled": True, "synchronized": False}}
    assert complete_ds_config({"timers": own}, recipe)["timers"] == own
    init_process_group()
    engine = Engine(load_objective(recipe), recipe, read_ds_config(deepspeed_file(recipe)))
    assert not engine.deepspeed.tput_timer.config.enabled
    engine.close()


def test_batches_reach_a_gpu_through_page_locked_memory(monkeypatch):
    sent: list[tuple] = []
    batch = make_batch()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: sent.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **o: sent.append((a, o)) or self)
    batch.to(torch.device("cuda"))
    assert sent == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})] * 6
    sent.clear()
    batch.to(torch.device("cpu"))
    assert "pinned" not in sent and len(sent) == 6


@pytest.mark.gpu
def test_a_batch_is_the_same_on_the_gpu():
    batch = make_batch()
    sent = batch.to(torch.device("cuda"))
    assert sent.input_ids.is_cuda and torch.equal(sent.input_ids.cpu(), batch.input_ids)
    assert torch.equal(sent.weights.cpu(), batch.weights) and sent.to(torch.device("cuda")).targets.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_closed_engine_gives_its_gpu_memory_back(tiny_recipe, name, monkeypatch):
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    recipe = make_recipe(tiny_recipe, deepspeed=name)
    init_process_group()
    held = []
    for _ in range(3):
        engine = Engine(load_objective(recipe), recipe, read_ds_config(deepspeed_file(recipe)))
        engine.step([make_batch()], seeds=[0], rates={"lr": 1e-3})
        engine.close()
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2] == held[1]
