"""Every causal architecture in transformers as a tiny random model; which train, and why others do not.

`config_of(name)` and `model_of(name)` build one in about 0.1 s; `TRAINED` are accepted by training.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.model.miniature import BEYOND, build, shrink

LENGTHS = (5, BEYOND, 7)
RATE = 1e-3
ALL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
GROUPS = {"n_group": 1, "topk_group": 1}
OVERRIDES: dict[
    str, dict[str, Any]
] = {  # what an architecture's default configuration leaves open or gets wrong
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_v2": GROUPS | {"num_experts_per_tok": 2},
    "dots1": GROUPS
    | {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128, "num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}
# Their default configurations don't build, need packages that we don't install, or are not loaded again by an
# Auto class (Emu3's text part).
UNBUILDABLE = frozenset(
    {
        "blt",
        "dbrx",
        "dots3_note",
        "emu3",
        "falcon_h1",
        "gemma3n",
        "gemma4_assistant",
        "gemma4_unified_assistant",
    }
    | {"musicgen", "musicgen_melody", "reformer", "qwen4_exp", "qwen4_exp_text", "zamba", "zamba2"}
)
TRAINED = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere_compass_text"),
    *("ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe"),
    *("exaone4", "exaone_moe", "flex_olmo", "fuyu", "gemma", "gemma3", "gemma3_text", "gemma3n_text"),
    *("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "got_ocr2", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe"),
    *("granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax"),
    *("internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama", "longcat_flash"),
    *("mellum", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral"),
    *("moshi", "moss_transcribe_diarize", "nanochat", "olmo", "olmo2", "olmo3", "olmoe", "opt"),
    *("persimmon", "phi", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "solar_open", "starcoder2", "whisper", "youtu"),
)


ON_GPUS = ("gemma2", "vaultgemma")  # soft caps on attention, which no backend on CPUs has
CARRIES, OWN, POSITIONS = "some carry a state from token to token", "code of its own", "counts positions"
MASK, BOTH, SINKS = "with an attention mask", "looks both ways", "attention sinks"
LOGITS = "changes its logits"
TELLS, UNDIVIDED = "don't tell their attention", "does not run its decoder apart"
PACKAGE = "flash-linear-attention"
BIAS, MASK_OF_ITS_OWN = "a bias of positions", "an attention mask of the model's own"
REFUSED = {  # the others, by the reason that training gives
    name: reason
    for reason, names in {
        CARRIES: "bailing_hybrid bamba falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3"
        " mamba mamba2 minimax nemotron_h recurrent_gemma rwkv xlstm zaya",
        OWN: "big_bird bloom codegen cpmant falcon git gpt_neo gpt_neox_japanese gptj megatron-bert mvp"
        " openai-gpt prophetnet rembert roformer trocr xglm xlm xlnet",
        POSITIONS: "bart blenderbot blenderbot-small marian mbart pegasus plbart",
        MASK: "axk2 deepseek_v32 dots3_note_text glm_moe_dsa hy_v4 mpt",
        BOTH: "bert bert-generation bigbird_pegasus camembert data2vec-text electra ernie roberta"
        " roberta-prelayernorm roc_bert xlm-roberta xlm-roberta-xl xmod",
        SINKS: "deepseek_v4 flint gpt_oss granite_swa granitemoe_swa inkling2_text mimo_v2_flash",
        LOGITS: "cohere cohere2 cohere2_moe minicpm3",
        TELLS: "nemotron stablelm",
        UNDIVIDED: "llama4 llama4_text mllama modernbert-decoder",
        PACKAGE: "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next",
        BIAS: "inkling_text",
        MASK_OF_ITS_OWN: "doge",
    }.items()
    for name in names.split()
}


def full_config_of(name: str, **changes: Any) -> Any:
    """A family's configuration at its default size.

    Args:
        changes: to the family's default configuration.
    """
    return CONFIG_MAPPING[name](**OVERRIDES.get(name, {}) | changes)


def config_of(name: str, **changes: Any) -> Any:
    """A miniature's configuration of a family.

    Args:
        changes: to the family's default configuration, before it is shrunk.
    """
    return shrink(full_config_of(name, **changes))


def model_of(name: str, *, attention: str = "eager", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model of a family with random weights and buffers, in evaluation mode."""
    return build(config_of(name, **changes), AutoModelForCausalLM, seed=seed, attn_implementation=attention)


def save_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write such a model as a Hugging Face folder (without a tokenizer)."""
    model_of(name, **changes).to(dtype).save_pretrained(folder)


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3, "capacity": 64},
            "train": {"lr": RATE, "max_grad_norm": 0.0},
            "deepspeed": "zero0",
        }
        | changes
    )


def documents(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        ids = rng.integers(3, 290, length).astype(np.int32)
        labels = np.full(length, UNTRAINED, np.int32)
        labels[1:-1] = ids[2:]
        made.append(SimpleNamespace(input_ids=ids, labels=labels, extra={}))
    return made


def collated(chosen: list[Any]) -> Any:
    trained = sum(n - 2 for n in LENGTHS)
    return collate(chosen, normalise="token", num_trained_in_step=trained, num_samples_in_step=len(LENGTHS))
