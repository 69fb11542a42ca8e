"""What weights do: counted as bitsandbytes holds them, as tokens meet them, as Muon updates them."""

from __future__ import annotations

import pytest
from families import config_of, full_config_of, recipe_for, save_family

from sftcore.config import AdapterSettings
from sftcore.model.cost import FOUR_BIT_BYTES, measure_model, measure_recipe
from sftcore.objectives import load_objective
from sftcore.train.optimizers import make_optimizer

QWEN3_30B = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128}
QWEN3_30B |= {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128}
QWEN3_30B |= {"num_experts_per_tok": 8, "vocab_size": 151936, "layer_types": None, "decoder_sparse_step": 1}


def test_a_model_of_30_billion_weights_of_which_a_token_meets_three():
    """Qwen3-30B-A3B: 128 experts of 3 x 2048 x 768 in 48 layers, 8 chosen; 30.5 billion, 3.3 active."""
    cost = measure_model(full_config_of("qwen3_moe", **QWEN3_30B), AdapterSettings(kind="qlora"))
    experts = 48 * 128 * 3 * 2048 * 768
    assert cost.num_parameters == pytest.approx(30.53e9, rel=1e-3)
    assert cost.num_active_parameters == cost.num_body_parameters - experts * 120 // 128
    assert cost.num_active_parameters + 2 * 151936 * 2048 == pytest.approx(3.35e9, rel=1e-2)
    attention = 48 * (2 * 4096 + 2 * 512) * 2048
    assert cost.num_quantised_parameters == attention  # routers are no linear layers
    weights = cost.state_bytes_per_rank(stage=0, world=1, weight_bytes=2, quantised=True)["weights"]
    held = cost.num_parameters * 2 - attention * (2 - FOUR_BIT_BYTES)
    assert weights == pytest.approx(held + 2 * cost.num_trained_parameters, rel=1e-6)
    assert weights > 58e9


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_what_is_held_in_four_bits_is_counted(tmp_path, family):
    pytest.importorskip("bitsandbytes")
    save_family(family, tmp_path)
    recipe = recipe_for(tmp_path, adapter={"kind": "qlora", "r": 4})
    model = load_objective(recipe)
    held = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    cost = measure_recipe(recipe)
    assert held and cost.num_quantised_parameters == 2 * sum(p.numel() for p in held)  # two in a byte
    assert cost.num_trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize("kind", ["none", "lora"])
def test_muons_state_is_that_of_the_matrices_it_updates(tmp_path, family, kind):
    """Layers of GPT-2 (Conv1D) and stacked experts are no linear layers: Adam's two moments."""
    save_family(family, tmp_path)
    adapter = {"kind": kind, "r": 4}
    recipe = recipe_for(tmp_path, adapter=adapter, train={"optimizer": "muon"}, deepspeed="zero0")
    optimizer = make_optimizer(load_objective(recipe), recipe.train)
    groups = optimizer.param_groups
    moments = sum(p.numel() * (4 if group["use_muon"] else 8) for group in groups for p in group["params"])
    cost = measure_recipe(recipe)
    states = cost.state_bytes_per_rank(stage=0, world=1, weight_bytes=4, optimizer="muon")
    assert states["optimizer"] == moments
    assert any(group["use_muon"] for group in groups) == (family != "gpt2" or kind == "lora")


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe", "jetmoe", "aria_text", "olmoe"])
def test_tokens_meet_the_chosen_experts_alone(family):
    config = config_of(family)
    cost = measure_model(config)
    assert cost.num_active_parameters < cost.num_body_parameters
    assert cost.coefficients.per_token == 6 * cost.num_active_parameters
    dense = measure_model(config_of("llama"))
    assert dense.num_active_parameters == dense.num_body_parameters
