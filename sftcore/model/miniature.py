"""A miniature: a model's configuration -> one of the same architecture that builds and runs in milliseconds.

In: a transformers configuration of any size, the longest text. Out: the same with small widths, one layer of
each kind (two at least), few experts; every length beyond which the model computes otherwise (`LENGTHS`) is
`SWITCH` tokens where texts reach it and far away where they don't.
Invariant: sizes alone change, and dropout is off: options, ratios, kinds of layers and what they share stay.
Trade-off: sizes are known by the names that transformers' causal families give them. A size of another name
stays as it is, and where sizes hang together in another way the miniature does not build; `proof` then has
the model's own weights alone to judge by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from sftcore.model.code import is_trusted

SWITCH = 8  # tokens: what lengths are shrunk to
BELOW, BEYOND = 5, 13  # tokens of a document on either side of it; two windows of SWITCH don't reach as far
FAR = 2**20
LENGTHS = (  # keys of configurations that hold such a length, at any depth
    *("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention"),
    *("swa_window_size", "keep_window_size", "index_topk", "floor_scale", "log_scaling_n_floor"),
    *("original_max_position_embeddings", "local_attn_chunk_length", "lsh_attn_chunk_length"),
)
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
MAX_POSITIONS = 256
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    *("encoder_layers", "num_encoder_layers", "depth", "num_layers_per_stack", "conf_num_hidden_layers"),
)
MIN_LAYERS, MAX_LAYERS = 2, 8
HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
)
GROUPS = (
    *("num_key_value_heads", "kv_n_heads", "num_kv_heads", "num_query_groups", "swa_num_key_value_heads"),
    "num_global_key_value_heads",
)
INDICES = ("mlp_only_layers", "full_attn_idxs", "hybrid_layer_ids", "cross_attention_layers", "moe_layers")
SECTIONS = ("mrope_section",)
RANDOM = ("drop", "jitter")  # in the names of rates at which a forward is random
NUM_HEADS, HEAD = 4, 16
SIZES: dict[str, int] = {
    name: size
    for size, names in {
        300: "vocab_size vocab_size_per_layer_input unpadded_vocab_size vocab_offset decoder_vocab_size",
        64: "hidden_size n_embd d_model emb_dim embedding_dim attention_hidden_size lru_width"
        " word_embed_proj_dim embedding_size input_embedding_size output_embedding_size out_hidden_size"
        " backbone_hidden_size projection_dim image_size adapter_out_dim audio_vocab_size codebook_size",
        NUM_HEADS: " ".join(HEADS)
        + " linear_num_heads index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts"
        " zero_expert_num linear_num_value_heads swa_num_attention_heads num_attention_heads_per_layer",
        2: "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts n_group n_groups"
        " num_expert_group linear_num_key_heads altup_num_inputs H_cycles L_cycles number_of_conv_states"
        " index_topk_blocks n_layers_per_attn_res_block num_mem_blocks first_k_dense_replace"
        " num_dense_layers layer_group_size attn_layer_period expert_layer_period moe_layer_end_index"
        " o_groups",
        1: "topk_group n_shared_experts num_shared_experts num_nextn_predict_layers",
        HEAD: "head_dim global_head_dim swa_head_dim swa_v_head_dim qk_nope_head_dim linear_key_head_dim"
        " linear_value_head_dim linear_head_dim d_head dim_head attention_head_size d_kv index_head_dim"
        " mamba_head_dim mamba_d_head mamba_headdim query_pre_attn_scalar v_head_dim kv_channels",
        8: "qk_rope_head_dim rotary_dim q_lora_rank kv_lora_rank o_lora_rank mamba_d_state state_size"
        " ssm_state_size time_step_rank mamba_dt_rank mamba_n_heads mamba_num_heads laurel_rank"
        " hidden_size_per_layer_input mamba_chunk_size chunk_size index_block_size adapter_rank",
        128: "intermediate_size n_inner ffn_dim dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim mlp_dim"
        " ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size mamba_d_ssm",
        32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
        " shared_experts_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"
        " router_hidden_size position_bias_num_buckets",
    }.items()
    for name in names.split()
}
BREAKS = (  # how a model's code says that it can't be built or run so; the first: sizes don't fit
    *(StrictDataclassError, TypeError, LookupError, AttributeError, AssertionError, ValueError, ImportError),
    RuntimeError,
)
Values = dict[str, Any]


def lengths_of(config: Any) -> dict[str, int]:
    """Lengths in tokens up to which a model computes a text in one way and beyond which in another, by key.

    >>> from transformers import LlamaConfig, MistralConfig
    >>> lengths_of(MistralConfig(sliding_window=4096)), lengths_of(LlamaConfig())
    ({'sliding_window': 4096}, {})
    """
    return dict(_lengths(config.get_text_config().to_dict()))


def _lengths(values: Values) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif key in LENGTHS and isinstance(value, int) and value > 0:
            yield key, value
        elif key in POSITIONS and _is_dynamic(values):
            yield key, value


def _is_dynamic(values: Values) -> bool:
    """Whether rotary frequencies follow the text's length once it is beyond the table's (dynamic NTK)."""
    rope = values.get("rope_parameters") or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any("dynamic" in str(kind.get("rope_type")) for kind in kinds)


def shrink(config: Any, *, longest: int = FAR) -> Any:
    """The configuration of a miniature.

    Args:
        longest: tokens of the longest text: lengths that it does not reach are out of the miniature's reach.
    """
    return type(config).from_dict(_shrunk(config.to_dict(), longest))


def build(config: Any, kind: Any, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A float32 model of a miniature's configuration in evaluation mode, with random weights and buffers.

    Weights are larger than those that training starts from: in a fresh model attention hardly matters.

    Args:
        kind: an Auto class.
        options: for its `from_config`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_config(
            config, dtype=torch.float32, trust_remote_code=is_trusted(config), **options
        )
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    noise = torch.randn_like(tensor) * 0.1
                    tensor.copy_(noise if tensor.ndim > 1 else tensor + noise)
    return model.eval()


def _shrunk(values: Values, longest: int) -> Values:
    kept = _kept_layers(values)
    small: Values = {}
    for key, value in values.items():
        if key == "quantization_config":
            continue
        small[key] = _value(key, value, values, kept, longest)
    if _is_dynamic(values):
        small |= {key: _length(values[key], longest) for key in POSITIONS if key in values}
    if small.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(i >= _first_shared(values) for i in kept)
    return small | dict(_sums(values, small))


def _sums(values: Values, small: Values) -> Iterator[tuple[str, int]]:
    """Sizes that others determine."""
    nope, rotated = values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rotated, int):
        others = (values.get("per_layer_config") or {}).values()
        wholes = {rotated + other.get("qk_nope_head_dim", nope) for other in (values, *others)}
        whole = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        for key in ("head_dim", "qk_head_dim"):
            if values.get(key) in wholes:
                yield key, whole
            elif values.get(key) == rotated:
                yield key, small["qk_rope_head_dim"]
    if "expand" in values and "num_heads" in values:  # Mamba 2
        yield "num_heads", small["hidden_size"] * values["expand"] // small["head_dim"]
    if "attn_layer_offset" in values:  # Jamba
        yield "attn_layer_offset", 1


def _value(key: str, value: Any, values: Values, kept: list[int], longest: int) -> Any:
    """What a key of a configuration becomes."""
    if isinstance(value, dict):
        return _dictionary(key, value, values, kept, longest)
    if isinstance(value, list):
        return _list(key, value, values, kept)
    if isinstance(value, float):
        return 0.0 if any(word in key for word in RANDOM) else value
    if isinstance(value, int) and not isinstance(value, bool):
        return _size(key, value, values, kept, longest)
    return value


def _dictionary(key: str, value: Values, values: Values, kept: list[int], longest: int) -> Values:
    if key in ("id2label", "label2id"):
        return value
    if key == "per_layer_config":
        return _per_layer(value, kept, longest)
    return _rope(value, values, longest) if key.startswith("rope_") else _shrunk(value, longest)


def _size(key: str, value: int, values: Values, kept: list[int], longest: int) -> int:
    if key in LENGTHS:
        return _length(value, longest) if value > 0 else value
    if key in LAYERS:
        return len(kept) if value else value
    if key in GROUPS:
        return _groups(value, values)
    if key in POSITIONS:
        return min(value, MAX_POSITIONS)
    if key.endswith(("_token_id", "_token_index", "_idx", "_index")):
        return min(value, SIZES["vocab_size"] - 1)
    return min(value, SIZES.get(key, value))


def _length(value: int, longest: int) -> int:
    return SWITCH if value < longest else FAR if value > FAR else value if value > BEYOND else FAR


def _groups(value: int, values: Values) -> int:
    """Key and value heads: as many as there are of queries, or one, or half as many."""
    heads = next((values[name] for name in HEADS if isinstance(values.get(name), int)), value)
    small = min(heads, NUM_HEADS)
    return small if value == heads else 1 if value == 1 or small % 2 else small // 2


def _num_layers(values: Values) -> int:
    return next((values[name] for name in LAYERS if isinstance(values.get(name), int)), 0)


def _first_shared(values: Values) -> int:
    """The first layer that takes its keys and values from another."""
    return _num_layers(values) - int(values.get("num_kv_shared_layers") or 0)


def _kept_layers(values: Values) -> list[int]:
    """Numbers of the layers that stay: the first of each kind, and at least two."""
    count = _num_layers(values)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    indices = [values[key] for key in INDICES if isinstance(values.get(key), list)]
    others = values.get("per_layer_config") or {}
    shared, dense = _first_shared(values), values.get("first_k_dense_replace") or 0
    kinds: dict[str, int] = {}
    for i in range(count):
        own = [value[i] for value in lists], [i in index for index in indices], others.get(f"{i:02d}")
        kinds.setdefault(str((*own, i >= shared, i < dense)), i)
    kept = sorted(kinds.values())[:MAX_LAYERS]
    rest = (i for i in range(count) if i not in kept)
    while len(kept) < min(MIN_LAYERS, count):
        kept = sorted([*kept, next(rest)])
    return kept


def _per_layer(others: Values, kept: list[int], longest: int) -> Values:
    found = {f"{new:02d}": others.get(f"{old:02d}") for new, old in enumerate(kept)}
    return {key: _shrunk(value, longest) for key, value in found.items() if value}


def _list(key: str, value: list[Any], values: Values, kept: list[int]) -> list[Any]:
    if key in INDICES:
        return [new for new, old in enumerate(kept) if old in value]
    if len(value) == _num_layers(values) and value:
        value = [value[i] for i in kept]
    return [
        min(each, SIZES.get(key, each)) if isinstance(each, int) and not isinstance(each, bool) else each
        for each in value
    ]


def _rope(rope: Values, values: Values, longest: int) -> Values:
    """Rotary parameters: lengths, and lists with an entry for each frequency."""
    small: Values = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            small[key] = _rope(value, values, longest)
        elif key in LENGTHS and isinstance(value, int):
            small[key] = _length(value, longest)
        elif isinstance(value, list) and key.endswith("_factor"):
            small[key] = value[: _num_frequencies(rope, values)]
        elif key in SECTIONS:
            small[key] = [max(1, HEAD // 2 * part // sum(value)) for part in value]
        else:
            small[key] = value
    return small


def _num_frequencies(rope: Values, values: Values) -> int:
    """Rotary frequencies of a miniature's head."""
    heads = next((values[name] for name in HEADS if isinstance(values.get(name), int)), 1)
    width = min(values.get("hidden_size") or SIZES["hidden_size"], SIZES["hidden_size"])
    head = values.get("qk_rope_head_dim") or values.get("head_dim") or width // min(heads, NUM_HEADS)
    size = min(head, SIZES["qk_rope_head_dim"] if values.get("qk_rope_head_dim") else HEAD)
    return int(size * (rope.get("partial_rotary_factor") or 1)) // 2
