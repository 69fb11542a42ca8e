"""torch's own varlen attention (`torch.nn.attention.varlen`, torch >= 2.11, CUDA).

In: q, k, v of a pack and its document borders. Out: attention of each document alone.
Invariant: queries and keys get the same cu_seqlens tensor object (cuDNN takes causal packs only so).
Trade-off: nothing to install, where flash-attn takes an hour to compile; versions before 2.12 have no
grouped heads, so keys and values are repeated there (H / G times their memory for one layer at a time).

Shapes: T tokens of the pack, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention import varlen

from sftcore.model.attention.needs import AttentionNeeds, lacks_of_all, refuse_unapplied

NAME = "torch_varlen"
MAX_HEAD_SIZE = 256
UNLIMITED = -1  # "(-1, 0) for causal attention, or (W, 0) for causal with a window" (torch's documentation)


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why this backend can't serve these needs; empty if it can."""
    reasons = []
    if needs.device != "cuda":
        reasons.append("it needs a CUDA device")
    if needs.dtype != "bfloat16":
        reasons.append(f"it computes in bfloat16, not {needs.dtype}")
    if needs.head_size > MAX_HEAD_SIZE:
        reasons.append(f"its heads have at most {MAX_HEAD_SIZE} elements, not {needs.head_size}")
    if needs.softcap is not None:
        reasons.append("it has no soft cap on attention logits")
    if needs.value_size != needs.head_size:
        reasons.append(f"its values are of its keys' size, not {needs.value_size} next to {needs.head_size}")
    return reasons + lacks_of_all(needs)


def torch_varlen_attention(
    module: torch.nn.Module,
    q_1HTD: torch.Tensor,
    k_1GTD: torch.Tensor,
    v_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it.

    Args:
        sliding_window: a position sees itself and the sliding_window - 1 positions before it.

    Returns:
        (1, T, H, D) and None.

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    q_THD, k_TGD, v_TGD = (t[0].transpose(0, 1) for t in (q_1HTD, k_1GTD, v_1GTD))
    options: dict[str, Any] = {}
    group = q_THD.shape[1] // k_TGD.shape[1]
    if group > 1 and "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
        options["enable_gqa"] = True
    elif group > 1:
        k_TGD, v_TGD = (t.repeat_interleave(group, 1) for t in (k_TGD, v_TGD))
    out_THD = varlen.varlen_attn(
        q_THD,
        k_TGD,
        v_TGD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(UNLIMITED if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    assert isinstance(out_THD, torch.Tensor)  # a tuple only if auxiliary results are asked for
    return out_THD[None], None
