"""What a model's attention needs, read from its configuration, and from what its layers hand over.

In: a transformers configuration, or one call of an attention. Out: `AttentionNeeds`, which each backend
compares with what it can do; or a refusal.
Invariant: what a layer hands to its attention and the backend would drop (sinks, biases, masks, other than
causal order) is refused at the call, whatever the configuration says of it.
Trade-off: eight facts cover the causal LMs of transformers 5; reading them costs nothing, and models are
listed by name only where their configurations don't tell (attention sinks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

SINK_MODEL_TYPES = frozenset(  # those whose layers have `sinks` in transformers 5.23
    {"deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2", "inkling2_text"}
    | {"mimo_v2_flash", "openai_privacy_filter"}
)
UNAPPLIED = {  # what transformers' layers hand to attention besides q, k, v, and no backend of ours applies
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias of positions",
    "softcap": "a soft cap on attention logits",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeeds:
    """What an attention backend must be able to do.

    Args:
        head_size: D, of queries and keys.
        value_size: of values; the same but in multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
        dtype: "bfloat16" or "float32", in which q, k and v come.
        device: "cuda" or "cpu".
        softcap: attention logits are capped softly at this value; None: not at all.
        sinks: each head has a learned logit that takes part in the softmax.
        both_ways: a position also sees those after it.
        chunks: a position sees only those of its own chunk (Llama 4).
    """

    head_size: int
    value_size: int
    dtype: str
    device: str
    softcap: float | None = None
    sinks: bool = False
    both_ways: bool = False
    chunks: bool = False


def needs_of(config: Any, *, dtype: str, device: str) -> AttentionNeeds:
    """Read a causal LM's configuration."""
    text = config.get_text_config()
    values = text.to_dict()
    key, value = head_sizes(config)
    looks_ahead = values.get("use_bidirectional_attention") in (True, "all")
    others = [layer.get("head_dim") for layer in (values.get("per_layer_config") or {}).values()]  # Gemma 4
    others += [values.get(name) for name in ("global_head_dim", "swa_head_dim")]
    largest = max(key, *(size or 0 for size in others))
    return AttentionNeeds(
        head_size=largest,
        value_size=largest if value == key else max(value, values.get("swa_v_head_dim") or 0),
        dtype=dtype,
        device=device,
        softcap=values.get("attn_logit_softcapping"),
        sinks=text.model_type in SINK_MODEL_TYPES,
        both_ways=looks_ahead or values.get("is_causal") is False,
        chunks="chunked_attention" in (values.get("layer_types") or ()),
    )


def head_sizes(config: Any) -> tuple[int, int]:
    """Elements of a head's queries and keys, and of its values, in most layers.

    >>> from transformers import DeepseekV3Config, LlamaConfig
    >>> head_sizes(LlamaConfig(hidden_size=64, num_attention_heads=4))
    (16, 16)
    >>> head_sizes(DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128))
    (192, 128)
    """
    text = config.get_text_config()
    values = text.to_dict()
    unrotated, rotated = values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim")
    if unrotated is not None and rotated is not None:
        key = unrotated + rotated
    else:
        key = values.get("head_dim") or text.hidden_size // text.num_attention_heads
    return key, values.get("v_head_dim") or key


def lacks_of_all(needs: AttentionNeeds) -> list[str]:
    """What no backend can do, as reasons; empty if the model needs none of it."""
    reasons = []
    if needs.sinks:
        reasons.append("it has no attention sinks")
    if needs.both_ways:
        reasons.append("it is causal, and the model looks both ways (use_bidirectional_attention)")
    if needs.chunks:
        reasons.append("it has no chunked attention")
    return reasons


def refuse_unapplied(module: nn.Module, attention_mask: Any, extras: Mapping[str, Any]) -> None:
    """Refuse a call that wants of an attention what it would not compute.

    Args:
        module: the layer; transformers marks one that looks both ways with `is_causal = False`.
        extras: the call's keyword arguments that the attention does not name.

    Raises:
        ValueError: names what would be dropped.
    """
    dropped = [f"{why} ({name})" for name, why in UNAPPLIED.items() if extras.get(name) is not None]
    own = extras.get("is_causal")
    if not (vars(module).get("is_causal", True) if own is None else own):
        dropped.append("attention that looks both ways (is_causal=False)")
    if attention_mask is not None:
        dropped.append("an attention mask of the model's own")
    if dropped:
        raise ValueError(f"packs can't have {', '.join(dropped)}")
