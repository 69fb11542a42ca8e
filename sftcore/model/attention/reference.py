"""Per-document attention written out, for miniatures: any device and dtype, soft caps too.

In: q, k, v of a pack and its document lengths. Out: attention of each document alone.
Invariant: takes and refuses what all backends take and refuse: what a miniature computes with it, an able
backend computes, too.
Trade-off: a (L, L) matrix of scores for each document, good for tens of tokens and for nothing else.

Shapes: T tokens of the pack, H query heads, G key/value heads, D head size, L tokens of a document.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from sftcore.model.attention.needs import refuse_unapplied

NAME = "sftcore_reference"


def register_reference_attention() -> str:
    """Make it known to transformers; returns the name to build a model with."""
    AttentionInterface.register(NAME, reference_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    return NAME


def reference_attention(
    module: torch.nn.Module,
    q_1HTD: torch.Tensor,
    k_1GTD: torch.Tensor,
    v_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it.

    Args:
        document_lengths: tokens of each document, summing to T.
        sliding_window: a position sees itself and the sliding_window - 1 positions before it.
        softcap: scores become softcap * tanh(score / softcap).

    Returns:
        (1, T, H, D) and None.

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    scale = q_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    group = q_1HTD.shape[1] // k_1GTD.shape[1]
    lengths = list(document_lengths)
    parts = (t[0].split(lengths, 1) for t in (q_1HTD, k_1GTD, v_1GTD))
    outputs = []
    for q_HLD, k_GLD, v_GLD in zip(*parts, strict=True):
        k_HLD, v_HLD = (t.repeat_interleave(group, 0) for t in (k_GLD, v_GLD))
        scores_HLL = (q_HLD @ k_HLD.mT * scale).float()
        if softcap is not None:
            scores_HLL = softcap * torch.tanh(scores_HLL / softcap)
        position = torch.arange(q_HLD.shape[1], device=q_HLD.device)
        distance = position[:, None] - position[None]
        seen = (distance >= 0) & (distance < (sliding_window or len(position)))
        weights_HLL = torch.softmax(scores_HLL.masked_fill(~seen, -torch.inf), -1).to(v_HLD.dtype)
        outputs.append((weights_HLL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs)[None], None
