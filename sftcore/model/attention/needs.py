"""What a model's attention needs, read from its configuration.

In: a transformers configuration. Out: `AttentionNeeds`, which each backend compares with what it can do.
Invariant: a need that is not listed here is not known to us; before training, `model.load` compares packed
and lone documents numerically, so an unknown one shows there.
Trade-off: five facts cover the causal LMs of transformers 5; reading them costs nothing, and no model is
listed by name but where its configuration does not tell (gpt-oss's attention sinks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SINK_MODEL_TYPES = ("gpt_oss",)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeeds:
    """What an attention backend must be able to do.

    Args:
        head_size: D.
        dtype: "bfloat16" or "float32", in which q, k and v come.
        device: "cuda" or "cpu".
        softcap: attention logits are capped softly at this value; None: not at all.
        sinks: each head has a learned logit that takes part in the softmax.
    """

    head_size: int
    dtype: str
    device: str
    softcap: float | None
    sinks: bool


def needs_of(config: Any, *, dtype: str, device: str) -> AttentionNeeds:
    """Read a causal LM's configuration."""
    text = config.get_text_config()
    values = text.to_dict()
    return AttentionNeeds(
        head_size=values.get("head_dim") or text.hidden_size // text.num_attention_heads,
        dtype=dtype,
        device=device,
        softcap=values.get("attn_logit_softcapping"),
        sinks=text.model_type in SINK_MODEL_TYPES,
    )
