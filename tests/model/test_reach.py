"""Weights that no text reaches: frozen, named, without states, left out of adapters and costs."""

from __future__ import annotations

import logging

import pytest
import torch
from families import collated, config_of, documents, full_config_of, recipe_for, save_family
from transformers import AutoModelForCausalLM

from sftcore.model.adapter_files import is_update
from sftcore.model.adapters import trained_names
from sftcore.model.cost import measure_model
from sftcore.model.reach import unreached
from sftcore.objectives import load_objective
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import Engine, init_process_group

TOWER = "model.vision_tower."


@pytest.mark.parametrize("stage", ["zero0", "zero1"])
def test_a_vision_tower_is_neither_trained_nor_decayed(tmp_path, caplog, stage):
    save_family("gemma3", tmp_path)
    recipe = recipe_for(tmp_path, deepspeed=stage, train={"lr": 1e-2, "weight_decay": 0.5})
    with caplog.at_level(logging.INFO):
        model = load_objective(recipe)
    assert "frozen, because no text reaches them" in caplog.text and "model.vision_tower (" in caplog.text
    weights = dict(model.causal_lm.named_parameters())
    frozen = {name for name, p in weights.items() if not p.requires_grad}
    assert {name for name in weights if name.startswith(TOWER)} <= frozen
    assert not any(name.startswith("model.language_model") for name in frozen)
    before = {name: p.detach().clone() for name, p in weights.items()}
    init_process_group()
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    engine.step([collated(documents(0))], seeds=[0], rates={"lr": 1e-2})
    states = sum(
        t.numel() for state in engine.deepspeed.basic_optimizer.state.values() for t in state.values()
    )
    trained = sum(p.numel() for name, p in weights.items() if name not in frozen)
    assert 2 * trained <= states < 2 * trained + len(weights)
    changed = {name for name, p in weights.items() if not torch.equal(p.detach(), before[name])}
    assert changed == set(weights) - frozen
    engine.close()


def test_adapters_leave_out_what_no_text_reaches(tmp_path):
    save_family("gemma3", tmp_path)
    model = load_objective(recipe_for(tmp_path, adapter={"kind": "lora", "r": 4})).causal_lm
    trained = {name for name in trained_names(model) if is_update(name)}
    assert trained and not any(TOWER in name for name in trained)


def test_costs_count_what_is_trained():
    """The tower's weights are held and neither computed with nor trained."""
    config = config_of("gemma3")
    cost = measure_model(config)
    text = measure_model(config.text_config)
    tower = cost.num_parameters - text.num_parameters
    assert tower > 0 and cost.num_unreached_parameters == tower and cost.trains_all
    assert cost.num_trained_parameters == text.num_trained_parameters
    assert cost.coefficients == text.coefficients


def test_all_of_a_text_model_is_in_reach():
    for name in ("llama", "mixtral", "deepseek_v3", "gemma3_text"):
        assert unreached(full_config_of(name), AutoModelForCausalLM) == frozenset()
