"""What a configuration asks for and training doesn't give: refused before anything is made, or said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from launcher_commands import save
from miniature_runs import save_base
from safetensors.torch import load_file, save_file
from tiny import TINY, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, write_json
from sftcore.model.demands import check_demands
from sftcore.model.load import load_config, load_for_training
from sftcore.planning.outlook import why_not_trainable
from sftcore.recipe import load_recipe
from sftcore.stages.train import train_recipe
from sftcore.train.devices import Device

CPUS = Device(name="CPUs", is_gpu=False, memory_bytes=8 * 10**9)
ENDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2 = GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
OPT = OPTConfig(
    **ENDS,
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}


def recipe_with(tiny_recipe, config, **changes):
    """A recipe for a new model of this configuration."""
    AutoModelForCausalLM.from_config(config).save_pretrained("other")
    tiny_tokenizer().save_pretrained("other")
    return load_recipe(Path(save(tiny_recipe, model={"path": "other", "dtype": "float32"}, **changes)))


@pytest.mark.parametrize("config", [GPT2, OPT], ids=["gpt2", "opt"])
def test_samples_longer_than_a_table_of_positions_are_refused_first(tiny_recipe, config):
    recipe = recipe_with(tiny_recipe, config)
    refusal = why_not_trainable(recipe, CPUS)
    assert refusal is not None
    for found in (str(refusal), message_of(lambda: train_recipe(recipe))):
        assert "samples may be longer than the table of positions" in found
        assert "got: 256 (batch.capacity)" in found and "do: set data.max_length: 64" in found
    assert not list(Path().glob("**/plan.json")) and not list(Path().glob("**/*.bin"))
    short = recipe_with(tiny_recipe, config, data=tiny_recipe["data"] | {"max_length": 64})
    assert why_not_trainable(short, CPUS) is None
    load_for_training(short)


def message_of(action) -> str:
    with pytest.raises(UserInputError) as caught:
        action()
    return str(caught.value)


def test_computed_positions_have_no_limit(tiny_recipe):
    config = LlamaConfig(**TINY, max_position_embeddings=16)
    check_demands(recipe_with(tiny_recipe, config), config)


def test_a_loss_of_routers_is_refused_with_the_remedy(tiny_recipe):
    config = MixtralConfig(**TINY, **ROUTED, output_router_logits=True, router_aux_loss_coef=0.5)
    recipe = recipe_with(tiny_recipe, config)
    for found in (str(why_not_trainable(recipe, CPUS)), message_of(lambda: load_for_training(recipe))):
        assert "model type 'mixtral' asks for a loss of its routers" in found
        assert "got: output_router_logits: true, router_aux_loss_coef: 0.5" in found
        assert "set output_router_logits: false" in found


def test_a_routers_coefficient_alone_is_said(tiny_recipe, caplog):
    recipe = recipe_with(tiny_recipe, MixtralConfig(**TINY, **ROUTED, router_aux_loss_coef=0.25))
    with caplog.at_level(logging.WARNING):
        load_for_training(recipe)
    assert caplog.text.count("router_aux_loss_coef: 0.25 of the model's config.json is not trained") == 1


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (LlamaConfig(**TINY, attention_dropout=0.5), "attention_dropout: 0.5"),
        (GPT2Config(**GPT2.to_diff_dict() | {"n_positions": 256, "attn_pdrop": 0.25}), "attn_pdrop: 0.25"),
    ],
)
def test_dropout_of_attention_is_said_once(tiny_recipe, caplog, config, line):
    with caplog.at_level(logging.WARNING):
        load_for_training(recipe_with(tiny_recipe, config))
    assert caplog.text.count(f"{line} of the model's config.json is taken as 0 in training") == 1


def test_nothing_is_said_of_a_plain_model(tiny_recipe, caplog):
    with caplog.at_level(logging.WARNING):
        load_for_training(recipe_with(tiny_recipe, tiny_config("llama")))
    assert "config.json" not in caplog.text


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_quantised_base_is_refused_before_anything_is_made(tiny_recipe, method, adapter):
    recipe = recipe_with(tiny_recipe, tiny_config("llama"), adapter={"kind": adapter})
    config = Path("other/config.json")
    write_json(config, read_json(config) | {"quantization_config": QUANTISED[method]})
    refusal = why_not_trainable(recipe, CPUS)
    assert refusal is not None
    for found in (str(refusal), message_of(lambda: train_recipe(recipe))):
        assert f"quantised already ({method})" in found and "in 16 bits" in found
    assert not Path(".cache/stores").exists(), "nothing was tokenised"


def test_quantised_weights_are_known_without_a_word_in_the_configuration(tiny_recipe):
    recipe = recipe_with(tiny_recipe, tiny_config("llama"))
    file = Path("other/model.safetensors")
    plain = load_file(file)
    plain["model.layers.0.self_attn.bias"] = torch.ones(4, dtype=torch.uint8)  # masks of old files
    save_file(plain, file, metadata={"format": "pt"})
    check_demands(recipe, load_config(recipe.model))
    weights = {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}
    weights8 = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    for few in (weights, weights8):
        save_file(plain | few, file, metadata={"format": "pt"})
        with pytest.raises(UserInputError, match=r"quantised already \(model.layers.0.mlp.up_proj"):
            check_demands(recipe, load_config(recipe.model))


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("ernie4_5_moe", {"deepspeed": "zero3"}, "keeps weights in float32, which ZeRO-3 can't"),
        ("gemma4_text", {"add_tokens": ["<new>"]}, "tokens can't be added to model type 'gemma4_text'"),
    ],
)
def test_what_the_layers_rule_out_is_in_the_plan_and_refused_first(tiny_recipe, family, changes, told):
    save_base(family, Path("other"))
    model = {"path": "other", "dtype": "bfloat16", "add_tokens": changes.get("add_tokens", [])}
    others = {key: value for key, value in changes.items() if key != "add_tokens"}
    recipe = load_recipe(Path(save(tiny_recipe, model=model, **others)))
    for found in (str(why_not_trainable(recipe, CPUS)), message_of(lambda: train_recipe(recipe))):
        assert told in found
    assert not Path(".cache/stores").exists(), "nothing was tokenised"
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"add_tokens": []})})
    assert why_not_trainable(plain.model_copy(update={"deepspeed": "zero2"}), CPUS) is None
