"""torch's flex_attention with a document mask, compiled (CUDA).

In: q, k, v of a pack and its document lengths. Out: attention of each document alone.
Invariant: the block mask is made once per pack and window and shared by all layers.
Trade-off: any head size, soft caps and windows, at the price of compiling (about 20 s at first use) and of
blocks of 128 tokens: documents far shorter than that share blocks, most of which is masked work.

Shapes: T tokens of the pack, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sftcore.model.attention.needs import AttentionNeeds, lacks_of_all, refuse_unapplied

NAME = "flex"
Score = Callable[..., torch.Tensor]


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why this backend can't serve these needs; empty if it can."""
    reasons = []
    if needs.device != "cuda":
        reasons.append("it trains on CUDA devices only")
    return reasons + lacks_of_all(needs)


def flex_docs_attention(
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
        sliding_window: a position sees itself and the sliding_window - 1 positions before it.

    Returns:
        (1, T, H, D) and None.

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    kernel: Any = _compiled() if q_1HTD.is_cuda else flex_attention
    out_1HTD = kernel(
        q_1HTD,
        k_1GTD,
        v_1GTD,
        score_mod=_capped(softcap) if softcap else None,
        block_mask=document_mask(document_lengths, sliding_window, q_1HTD.device),
        scale=scaling,
        enable_gqa=q_1HTD.shape[1] != k_1GTD.shape[1],
    )
    return out_1HTD.transpose(1, 2).contiguous(), None


@lru_cache(maxsize=8)
def document_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """Causal within each document, and within `window` positions if given."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def is_seen(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (document[q] == document[k]) & (q >= k)
        return seen if window is None else seen & (q - k < window)

    total = sum(lengths)
    return create_block_mask(is_seen, None, None, total, total, device=device)


@lru_cache(maxsize=4)
def _capped(softcap: float) -> Score:
    def cap(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)
