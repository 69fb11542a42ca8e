"""Exact per-document attention by torch's scaled_dot_product_attention: the reference, and the CPU's backend.

In: q, k, v of a pack and its document lengths. Out: attention of each document alone.
Invariant: no score between two documents is ever computed, so perturbing one can't change a bit of another.
Trade-off: documents of equal length share one call; a pack of 200 short documents has about 60 distinct
lengths, hence about 60 calls per layer instead of 200, at the price of one gather per tensor unless they
lie together.

Shapes: T tokens of the pack, H query heads, G key/value heads, D head size, N documents of equal length L.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sftcore.model.attention.needs import AttentionNeeds, lacks_of_all, refuse_unapplied

NAME = "sdpa_docs"


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why this backend can't serve these needs; empty if it can."""
    reasons = []
    if needs.softcap is not None:
        reasons.append("it has no soft cap on attention logits")
    return reasons + lacks_of_all(needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """Documents of a pack sorted by length, so that equal ones lie together.

    Args:
        groups: (length, number of documents), in the order in which they lie after sorting.
        order: (T,) int64, token positions in that order; None if the pack already lies so.
        inverse: (T,) int64, the way back.
    """

    groups: tuple[tuple[int, int], ...]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


@lru_cache(maxsize=4)
def group_documents(document_lengths: tuple[int, ...], device: torch.device) -> Grouping:
    """Plan the calls for a pack; all layers of a forward and backward share one plan."""
    lengths = torch.tensor(document_lengths)
    by_length = torch.argsort(lengths, descending=True, stable=True)
    values, counts = torch.unique_consecutive(lengths[by_length], return_counts=True)
    groups = tuple(zip(values.tolist(), counts.tolist(), strict=True))
    if torch.equal(by_length, torch.arange(len(lengths))):
        return Grouping(groups=groups, order=None, inverse=None)
    documents = torch.arange(int(lengths.sum())).split(list(document_lengths))
    order = torch.cat([documents[d] for d in by_length.tolist()])
    return Grouping(groups=groups, order=order.to(device), inverse=torch.argsort(order).to(device))


def sdpa_docs_attention(
    module: torch.nn.Module,
    q_1HTD: torch.Tensor,
    k_1GTD: torch.Tensor,
    v_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it; see the module's docstring.

    Args:
        document_lengths: tokens of each document, summing to T; handed through the model's forward.
        sliding_window: a position sees itself and the sliding_window - 1 positions before it.

    Returns:
        (1, T, H, D) and None (no attention weights).

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    plan = group_documents(document_lengths, q_1HTD.device)
    q, k, v = (
        t[0] if plan.order is None else t[0].index_select(1, plan.order) for t in (q_1HTD, k_1GTD, v_1GTD)
    )
    outputs, start = [], 0
    for length, count in plan.groups:
        end = start + length * count
        q_NHLD, k_NGLD, v_NGLD = (_documents(t[:, start:end], count) for t in (q, k, v))
        mask = _window_mask(length, sliding_window, q.device)
        out_NHLD = scaled_dot_product_attention(
            q_NHLD, k_NGLD, v_NGLD, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
        start = end
    out_THD = torch.cat(outputs)
    return (out_THD if plan.inverse is None else out_THD.index_select(0, plan.inverse))[None], None


def _documents(t_HSD: torch.Tensor, count: int) -> torch.Tensor:
    """(H, count * L, D) -> (count, H, L, D)."""
    heads, tokens, size = t_HSD.shape
    return t_HSD.view(heads, count, tokens // count, size).transpose(0, 1)


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(L, L) boolean band, or None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    return (distance >= 0) & (distance < window)
