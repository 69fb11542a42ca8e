"""Models that can't train in packs as they compute alone are refused by name; none ends in a traceback."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from sftcore.config import ModelSettings, Recipe
from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.generate.score import load_for_scoring
from sftcore.model import proof
from sftcore.model.attention import choose_attention, needs
from sftcore.model.classifier import load_classifier_for_training
from sftcore.model.cost import measure_model
from sftcore.model.forward import decode_states
from sftcore.model.load import load_for_training
from sftcore.model.ours import install_head
from sftcore.model.proof import probe_ids, prove_head_and_packs

SMALL = TINY | {"max_position_embeddings": 256}
ENDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
OLD = ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FALCON = ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
BOTH_WAYS = {"query_pre_attn_scalar": 8, "use_bidirectional_attention": True}
UNFIT = {  # how each broke, or trained wrongly
    "stablelm": SMALL,  # its layers get no arguments of the forward
    "nemotron": SMALL,
    "falcon": FALCON,  # a class per attention
    "gptj": OLD | {"rotary_dim": 4, "n_positions": 64},
    "mamba": MAMBA | {"state_size": 4},  # no heads
    "rwkv": MAMBA | {"attention_hidden_size": 32},
    "doge": SMALL,  # masks of its own
    "llama4_text": SMALL | {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
    "qwen3_next": SMALL | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    "granite_swa": SMALL | {"sliding_window": 4},  # sinks
    "flint": SMALL | {"sliding_window": 4},
    "mimo_v2_flash": SMALL | {"sliding_window": 4},
    "gemma3_text": SMALL | {"sliding_window": 20} | BOTH_WAYS,
}


def config_of(kind: str):
    return AutoConfig.for_model(kind, **UNFIT[kind])


def recipe_for(folder: Path, **changes) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3, "capacity": 64},
        }
        | changes
    )


@pytest.mark.parametrize("kind", UNFIT)
def test_models_that_cannot_train_in_packs_are_refused_by_name(tmp_path, kind):
    AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(tmp_path)
    with pytest.raises(
        (UserInputError, MissingEnvironmentError), match=f"model type '{kind}' can't|'{kind}'"
    ):
        load_for_training(recipe_for(tmp_path))


def test_a_missing_package_is_the_environments_lack(tmp_path):
    AutoModelForCausalLM.from_config(config_of("qwen3_next")).save_pretrained(tmp_path)
    with pytest.raises(MissingEnvironmentError, match="'qwen3_next'.*flash-linear-attention"):
        load_for_training(recipe_for(tmp_path))


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "llama4_text"])
def test_models_that_cannot_be_counted_are_refused_by_name(kind):
    with pytest.raises(UserInputError, match=f"model type '{kind}' can't be counted: "):
        measure_model(config_of(kind))


@pytest.mark.parametrize("kind", ["flint", "granite_swa", "gemma3_text"])
def test_labels_are_not_scored_with_attention_that_would_be_dropped(tmp_path, monkeypatch, kind):
    AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), dtype="float32")
    with pytest.raises(UserInputError, match="labels can't be scored.*(attention sinks|looks both ways)"):
        load_for_scoring(settings)
    forget(monkeypatch)
    with pytest.raises(UserInputError, match="labels can't be scored.*none of those that we compute"):
        load_for_scoring(settings)


@pytest.mark.parametrize("kind", ["flint", "granite_swa", "mimo_v2_flash"])
def test_an_attention_of_an_unknown_kind_is_found_by_its_states(monkeypatch, kind):
    """Sinks that no name tells of, neither the configuration's nor the call's."""
    forget(monkeypatch)
    with pytest.raises(UserInputError, match="its attention is none of those that we compute"):
        prove_head_and_packs(headed(config_of(kind)))


def forget(monkeypatch) -> None:
    """All that we know of attention beyond the plain one."""
    monkeypatch.setattr(needs, "UNAPPLIED", {})
    monkeypatch.setattr(needs, "SINK_MODEL_TYPES", frozenset())
    monkeypatch.setattr(needs, "refuse_unapplied", lambda *_: None)
    for name in ("tree", "sdpa_docs", "reference"):
        monkeypatch.setattr(f"sftcore.model.attention.{name}.refuse_unapplied", lambda *_: None)
        monkeypatch.setattr("sftcore.model.attention.sdpa_docs.lacks_of_all", lambda _: [])


def headed(config, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    name = choose_attention(config, "auto", dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    install_head(model, z_loss=0.0, label_smoothing=0.0, kind="chunked")
    return model


def test_short_windows_are_crossed():
    """A window one position off shows, though 7 tokens fit within it."""
    config = tiny_config("gemma3")
    config.sliding_window = 12
    model = headed(config)
    prove_head_and_packs(model)
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window -= 1
    with pytest.raises(UserInputError, match="its attention is none of those that we compute"):
        prove_head_and_packs(model)


@pytest.mark.parametrize(("seed", "most_are_off"), [(0, False), (3, False), (4, True)])
def test_roundings_that_choose_another_expert_are_no_reason(seed, most_are_off, monkeypatch):
    """Single tokens, or most of them, are far off; without the look at routers the last would be refused."""
    kind = SMALL | {"num_hidden_layers": 8, "num_local_experts": 32, "num_experts_per_tok": 2}
    model = headed(AutoConfig.for_model("mixtral", **kind), torch.bfloat16)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # those of experts have three
                parameter.normal_(0, 0.1)
    prove_head_and_packs(model)
    documents = probe_ids(model.config, sum(proof.DOCUMENTS)).split(list(proof.DOCUMENTS))
    with torch.no_grad():
        ours = [decode_states(model, proof.bare_batch(ids, [len(ids)])) for ids in documents]
        theirs = [proof.states_by_transformers(model, ids) for ids in documents]
        offs = [(a - b)[0, 1:].abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
        assert max(offs) > proof.TOLERANCES[torch.bfloat16], "a token met another expert"
        assert proof.computes_attention(model, documents, ours)
        monkeypatch.setattr(proof, "is_routed", lambda config: False)
        assert proof.computes_attention(model, documents, ours) != most_are_off


def test_the_proof_leaves_the_model_as_it_was():
    model = headed(tiny_config("llama")).train()
    before = model.config._attn_implementation
    prove_head_and_packs(model)
    assert model.training and model.config._attn_implementation == before


@pytest.mark.parametrize("pad", [None, 0, 28, 35])
def test_probe_ids_hold_no_pad(pad):
    config = tiny_config("llama")
    config.pad_token_id = pad
    ids = probe_ids(config, 12)
    assert len(ids) == 12 and (pad is None or pad not in ids.tolist())


@pytest.mark.parametrize("pad", [28, 35])
def test_a_classifier_whose_pad_is_an_ordinary_token_is_no_other(tmp_path, pad, monkeypatch):
    """transformers' own classifier reads the state of the last token that is no pad."""
    config = tiny_config("llama")
    config.pad_token_id = pad
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    matching = {"task": "matching", "matching": {"mode": "discriminative"}}
    recipe = recipe_for(tmp_path, data={"train": [{"format": "pairs", "path": "x"}]}, **matching)
    model = load_classifier_for_training(recipe)
    assert model.config.get_text_config().pad_token_id == pad
    monkeypatch.setattr(proof, "probe_ids", lambda config, n: torch.arange(1, n + 1) * 7 % config.vocab_size)
    refusal = pytest.raises(UserInputError, match="changes its logits") if pad == 35 else nullcontext()
    with refusal:  # 35 is the fifth of these ids, with which the first document ends
        load_classifier_for_training(recipe)
