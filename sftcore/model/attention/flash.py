"""The flash-attn package's varlen kernels: version 2, 3 (`flash_attn_interface`) or 4 (`flash_attn.cute`).

In: q, k, v of a pack and its document borders. Out: attention of each document alone.
Invariant: the kernel sees cu_seqlens as collate made them; no mask, no padding, no copy but a transpose
view.
Trade-off: fastest on the cards it is built for, but it must be compiled or found as a wheel (an hour from
source), so it is optional, and torch's own varlen kernel stands in.

Shapes: T tokens of the pack, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from sftcore.model.attention.needs import AttentionNeeds, lacks_of_all, refuse_unapplied

NAME = "flash_attn"
MAX_HEAD_SIZE = 256
MODULES = (
    "flash_attn_interface",
    "flash_attn.cute",
    "flash_attn",
)  # versions 3, 4 and 2, the first found is used
HINT = "install the extra: pip install 'sftcore[gpu]'"


@lru_cache(maxsize=1)
def find_kernel() -> tuple[str, Callable[..., Any]] | None:
    """Module name and its flash_attn_varlen_func, or None."""
    for name in MODULES:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        try:
            return name, importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
    return None


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why this backend can't serve these needs; empty if it can."""
    reasons = []
    if needs.device != "cuda":
        reasons.append("it needs a CUDA device")
    elif find_kernel() is None:
        reasons.append(f"the flash-attn package is not installed ({HINT})")
    if needs.dtype != "bfloat16":
        reasons.append(f"it computes in bfloat16, not {needs.dtype}")
    if needs.head_size > MAX_HEAD_SIZE:
        reasons.append(f"its heads have at most {MAX_HEAD_SIZE} elements, not {needs.head_size}")
    if needs.value_size != needs.head_size:
        reasons.append(f"its values are of its keys' size, not {needs.value_size} next to {needs.head_size}")
    return reasons + lacks_of_all(needs)


def flash_attention(
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
    found = find_kernel()
    assert found is not None
    module_name, kernel = found
    unlimited = None if module_name == "flash_attn.cute" else -1
    left = unlimited if sliding_window is None else sliding_window - 1
    right = unlimited if sliding_window is None else 0
    out = kernel(
        *(t[0].transpose(0, 1) for t in (q_1HTD, k_1GTD, v_1GTD)),
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seq_lens_q,
        max_seqlen_q=max_length_q,
        max_seqlen_k=max_length_q,
        softmax_scale=scaling,
        causal=True,
        window_size=(left, right),
        softcap=softcap or 0.0,
    )
    return (out[0] if isinstance(out, tuple) else out)[None], None
