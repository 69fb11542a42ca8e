"""Training goes on from a saved adapter with the function that it had, whatever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.model.adapter_files import read_adapter
from sftcore.model.demands import check_demands
from sftcore.model.identity import fingerprint_model
from sftcore.model.load import load_config
from sftcore.model.merge import merge_adapter
from sftcore.model.sameness import plain_logits
from sftcore.objectives import load_objective
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import Engine, init_process_group
from sftcore.train.export import export_weights

IDS = torch.arange(5, 45)
PATTERNS = {"alpha_pattern": {"q_proj": 64, r"layers\.1\.mlp\.up_proj": 5}, "rank_pattern": {"up_proj": 2}}
NEWER_KEYS = ("use_dora", "use_rslora", "alpha_pattern", "layer_replication", "lora_bias")
SAVED = {
    "patterns": PATTERNS,
    "rslora": PATTERNS | {"use_rslora": True},
    "dora": {"use_dora": True, "alpha_pattern": {"v_proj": 30}},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"},
    "dropped layers": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("qwen3")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_by_peft(base: Path, folder: Path, **changes: Any) -> torch.Tensor:
    """An adapter that does something, written by peft itself; the logits of base and adapter."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = ["q_proj", "up_proj", "v_proj"]
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "lora_dropout": 0.3} | changes)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return plain_logits(model.base_model.model, IDS)


def recipe_for(base: Path, adapter: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(base), "dtype": "float32"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3, "capacity": 64},
            "train": {"init_adapter": str(adapter)},
            "adapter": {"kind": "lora", "r": 4, "alpha": 8} | changes,
            "deepspeed": "zero0",
        }
    )


def packed_logits(model: Any) -> torch.Tensor:
    from sftcore.model.forward import pack_arguments
    from sftcore.model.proof import bare_batch

    return plain_logits(model.causal_lm, IDS, **pack_arguments(bare_batch(IDS, [len(IDS)])))


@pytest.mark.parametrize("kind", SAVED)
def test_the_first_forward_is_the_saved_adapters_and_so_are_its_exports(base, tmp_path, kind):
    changes = SAVED[kind]
    wanted = saved_by_peft(base, tmp_path / "saved", **changes)
    before = plain_logits(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager"), IDS
    )
    assert (wanted - before).abs().max() > 0.01, "the adapter does something"
    kinds = {"rslora": changes.get("use_rslora", False), "dora": changes.get("use_dora", False)}
    recipe = recipe_for(base, tmp_path / "saved", dropout=0.1, **kinds)
    model = load_objective(recipe)
    assert torch.allclose(packed_logits(model), wanted, atol=1e-5)
    assert sum(p.requires_grad for p in model.parameters()) == len(
        load_file(tmp_path / "saved" / "adapter_model.safetensors")
    )
    init_process_group()
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    export_weights(engine, tiny_tokenizer(), recipe, folder=tmp_path / "again")
    engine.close()
    merge_adapter(tmp_path / "again", tmp_path / "merged", recipe.model, quantised=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(plain_logits(merged, IDS), wanted, atol=1e-5)


def test_files_without_newer_keys_or_with_keys_of_tomorrow_are_read(base, tmp_path):
    wanted = saved_by_peft(base, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    known = json.loads(file.read_text())
    assert set(NEWER_KEYS) <= known.keys()
    older = {key: value for key, value in known.items() if key not in NEWER_KEYS and value is not None}
    file.write_text(json.dumps(older | {"key_of_tomorrow": False}))
    model = load_objective(recipe_for(base, tmp_path / "saved"))
    assert torch.allclose(packed_logits(model), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"(?s)another r\n.*got: 8\n.*allowed: 4\n.*set adapter.r as it was trained"),
        ({"use_rslora": True}, "another rslora"),
        ({"bias": "all"}, r"(?s)can't be trained on\n.*got: all"),
        ({"init_lora_weights": "pissa"}, r"(?s)can't be trained on\n.*got: pissa"),
    ],
)
def test_what_the_recipe_says_otherwise_or_can_not_be_trained_on_is_refused(base, tmp_path, changes, message):
    saved_by_peft(base, tmp_path / "saved", **changes)
    with pytest.raises(UserInputError, match=message):
        load_objective(recipe_for(base, tmp_path / "saved"))


def test_an_adapter_of_a_newer_kind_is_refused(base, tmp_path):
    saved_by_peft(base, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bends_weights": "twice"}))
    with pytest.raises(UserInputError, match=r"(?s)bends_weights: an adapter of this kind.*got: twice"):
        load_objective(recipe_for(base, tmp_path / "saved"))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{}", r"adapter_config.json: lacks peft_type"),
        ('{"peft_type": "LORA"}', r"adapter_config.json: lacks r, lora_alpha, target_modules"),
        ("[]", r"(?s)adapter_config.json: must be a mapping"),
        ("{", r"adapter_config.json: not valid JSON"),
        ({"r": "4"}, r"(?s)adapter_config.json: r: damaged\n.*got: '4'\n.*a whole number above 0"),
        ({"r": 0}, r"(?s)adapter_config.json: r: damaged\n.*got: 0"),
        ({"r": True}, r"(?s)adapter_config.json: r: damaged\n.*got: True"),
        ({"lora_alpha": None}, r"(?s)adapter_config.json: lora_alpha: damaged\n.*got: None"),
        ({"target_modules": 5}, r"(?s)adapter_config.json: target_modules: damaged"),
        ({"rank_pattern": {"q_proj": -1}}, r"(?s)adapter_config.json: rank_pattern: damaged"),
        ({"peft_type": "NEW"}, r"adapter_config.json: peft can't read this: .*NEW"),
        ({"peft_type": "IA3"}, r"(?s)peft_type: an adapter of this kind can't be trained on"),
        ({"layers_to_transform": "x"}, r"adapter_config.json: layers_to_transform: damaged"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, r"adapter_config.json: peft can't read this"),
        ({"r": 0, "use_dora": "yes"}, r"(?s)r: damaged.*use_dora: damaged\n.*true or false"),
    ],
)
def test_a_damaged_configuration_is_named_by_file_and_key_before_anything_is_loaded(
    base, tmp_path, written, told
):
    saved_by_peft(base, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_config.json"
    text = written if isinstance(written, str) else json.dumps(json.loads(file.read_text()) | written)
    file.write_text(text)
    recipe = recipe_for(base, tmp_path / "saved")
    with pytest.raises(UserInputError, match=told):
        check_demands(recipe, load_config(recipe.model))
    if isinstance(written, str):
        with pytest.raises(UserInputError, match="adapter_config.json: "):
            fingerprint_model(str(tmp_path / "saved"))
    if "can't be trained on" not in told:
        with pytest.raises(UserInputError, match=told):
            read_adapter(tmp_path / "saved")


@pytest.mark.parametrize("module", ["norm", "up_proj", "input_layernorm"])
def test_layers_trained_whole_are_refused_by_their_weights_before_anything_is_loaded(base, tmp_path, module):
    saved_by_peft(base, tmp_path / "saved", modules_to_save=[module])
    recipe = recipe_for(base, tmp_path / "saved")
    with pytest.raises(UserInputError, match=rf"(?s)trained whole.*got: .*{module}\.weight"):
        check_demands(recipe, load_config(recipe.model))


def test_layers_trained_whole_are_refused_where_only_the_model_tells_which(base, tmp_path):
    saved_by_peft(base, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    norm = torch.full((32,), 2.0)
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert norm.shape == own.model.norm.weight.shape
    for tensor, is_own in ((own.model.norm.weight.detach(), True), (norm, False)):
        save_file(load_file(file) | {"base_model.model.model.norm.weight": tensor}, file)
        if is_own:
            load_objective(recipe_for(base, tmp_path / "saved"))
            continue
        with pytest.raises(UserInputError, match="(?s)trained whole.*got: model.norm.weight"):
            load_objective(recipe_for(base, tmp_path / "saved"))


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_the_vocabulary_that_an_adapter_has_trained_is_trained_on(base, tmp_path, modules):
    wanted = saved_by_peft(base, tmp_path / "saved", modules_to_save=modules)
    file = tmp_path / "saved" / "adapter_model.safetensors"
    weights = load_file(file)
    whole = sorted(name for name in weights if ".lora_" not in name)
    assert [name.split(".")[-2] for name in whole] == sorted(modules, key=lambda name: name == "embed_tokens")
    changed = {name: weights[name] + 0.5 * torch.randn_like(weights[name]) for name in whole}
    save_file(weights | changed, file)
    recipe = recipe_for(base, tmp_path / "saved")
    check_demands(recipe, load_config(recipe.model))
    model = load_objective(recipe)
    logits = packed_logits(model)
    assert (logits - wanted).abs().max() > 0.1, "the saved rows are in use"
    trained = {name.split(".")[-2] for name, p in model.causal_lm.named_parameters() if p.requires_grad}
    assert trained & {"embed_tokens", "lm_head"} == set(modules)
    init_process_group()
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    export_weights(engine, tiny_tokenizer(), recipe, folder=tmp_path / "again")
    engine.close()
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], changed[name]) for name in whole)
    assert torch.allclose(
        packed_logits(load_objective(recipe_for(base, tmp_path / "again"))), logits, atol=1e-5
    )


def test_a_tied_vocabulary_that_was_trained_apart_is_refused(tmp_path):
    torch.manual_seed(0)
    config = tiny_config("qwen3")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    saved_by_peft(tmp_path / "tied", tmp_path / "saved", modules_to_save=["embed_tokens"])
    with pytest.raises(
        UserInputError, match="(?s)apart, which its base has tied.*embed_tokens.*remedy|do: merge"
    ):
        load_objective(recipe_for(tmp_path / "tied", tmp_path / "saved"))


def test_targets_that_the_recipe_lists_are_compared_and_all_linear_is_said_to_add_none(
    base, tmp_path, caplog
):
    saved_by_peft(base, tmp_path / "saved")
    with pytest.raises(UserInputError, match=r"(?s)another targets.*got: .*q_proj.*allowed: \['o_proj'\]"):
        load_objective(recipe_for(base, tmp_path / "saved", targets=["o_proj"]))
    with caplog.at_level("INFO", logger="sftcore"):
        load_objective(recipe_for(base, tmp_path / "saved", targets="all-linear"))
    assert "none are added: q_proj, up_proj, v_proj" in caplog.text
