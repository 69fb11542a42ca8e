"""Attention over packed documents: backends behind one signature, chosen by ability.

In: a model's configuration and a wish (`auto` or a name). Out: the name of a registered transformers
attention.
Invariant: what a model needs and a backend can't do is refused by name, never approximated.
Trade-off: backends see documents, not masks, so no (T, T) mask exists anywhere: at T = 16,384 that mask
alone would be 256 MB as booleans.
"""

from __future__ import annotations

import logging

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from sftcore.errors import Problem, UserInputError
from sftcore.model.attention.sdpa_docs import sdpa_docs_attention

log = logging.getLogger(__name__)
BACKENDS = {"sdpa_docs": sdpa_docs_attention}
PREFIX = "sftcore_"  # of the names registered with transformers
# Configuration keys of needs that sdpa_docs lacks: (key, what it means).
UNSUPPORTED_NEEDS = {
    "attn_logit_softcapping": "attention logits with a soft cap",
    "attention_sinks": "attention sinks",
}


def choose_attention(config: PretrainedConfig, wish: str) -> str:
    """Name of the attention implementation to load a model with, registered with transformers.

    Args:
        config: the model's configuration.
        wish: `auto` or a name in BACKENDS.

    Raises:
        UserInputError: the model needs something that the backend can't do.
    """
    name = "sdpa_docs" if wish == "auto" else wish
    values = config.get_text_config().to_dict()
    needs = [what for key, what in UNSUPPORTED_NEEDS.items() if values.get(key)]
    if config.model_type == "gpt_oss":
        needs.append("attention sinks")
    if needs:
        raise UserInputError(
            Problem(
                what=f"attention backend {name!r} can't do what model type {config.model_type!r} needs",
                where="model.attention",
                got=", ".join(needs),
            )
        )
    AttentionInterface.register(PREFIX + name, BACKENDS[name])
    AttentionMaskInterface.register(PREFIX + name, _no_mask)
    log.info("attention backend: %s", name)
    return PREFIX + name


def _no_mask(*_: object, **__: object) -> torch.Tensor | None:
    """Backends take document borders instead of a mask."""
    return None
