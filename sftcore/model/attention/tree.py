"""Attention over a tree of texts: a prefix that all prompts share, prompts, and each prompt's continuations.

In: q, k, v of a pack laid out as below, and its shape. Out: attention of each path from the root alone.
Invariant: a continuation sees the prefix, its prompt and itself, as if it stood alone; no score between two
prompts, or between two continuations of one prompt, is ever kept.
Trade-off: prompts of equal shape share one call; a mask of (L, P + L) booleans stands for the forks (100 KB
for a prompt of 40 tokens behind a prefix of 2,500), where documents one by one would repeat prefix and prompt
for every continuation.

    prefix | prompt 0 | continuation 0.0 | continuation 0.1 | prompt 1 | continuation 1.0 | ...

Shapes: T tokens of the pack, P of the prefix, L of a prompt with its continuations; H query heads, G
key/value heads, D head size, N prompts of equal shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sftcore.model.attention.needs import AttentionNeeds
from sftcore.model.attention.sdpa_docs import lacks as lacks_of_sdpa

NAME = "sftcore_tree"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A prompt and its continuations, in tokens: `trunk` and then `branches` side by side."""

    trunk: int
    branches: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.trunk + sum(self.branches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The shape of a pack: `prefix` tokens, then the forks; equal ones lie together."""

    prefix: int
    forks: tuple[Fork, ...]

    def groups(self) -> list[tuple[Fork, int]]:
        """Runs of equal forks with their number.

        >>> Tree(prefix=0, forks=(Fork(trunk=2), Fork(trunk=2), Fork(trunk=1))).groups()
        [(Fork(trunk=2, branches=()), 2), (Fork(trunk=1, branches=()), 1)]
        """
        runs: list[tuple[Fork, int]] = []
        for fork in self.forks:
            if runs and runs[-1][0] == fork:
                runs[-1] = (fork, runs[-1][1] + 1)
            else:
                runs.append((fork, 1))
        return runs


def register_tree_attention() -> str:
    """Make it known to transformers; returns the name to load a model with."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    return NAME


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why a model's attention can't be computed so; empty if it can."""
    return lacks_of_sdpa(needs)


def positions(fork: Fork, prefix: int) -> list[int]:
    """Position of each token of a fork on its path from the root.

    >>> positions(Fork(trunk=3, branches=(1, 2)), prefix=10)
    [10, 11, 12, 13, 13, 14]
    """
    end = prefix + fork.trunk
    return [*range(prefix, end), *(end + i for branch in fork.branches for i in range(branch))]


def tree_attention(
    module: torch.nn.Module,
    q_1HTD: torch.Tensor,
    k_1GTD: torch.Tensor,
    v_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: Tree,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it; see the module's docstring.

    Args:
        tree: handed through the model's forward; its tokens sum to T.
        sliding_window: a position sees itself and the sliding_window - 1 positions before it, on its path.

    Returns:
        (1, T, H, D) and None (no attention weights).
    """
    assert attention_mask is None, "trees carry their shape, not masks"
    q_HTD, k_GTD, v_GTD = q_1HTD[0], k_1GTD[0], v_1GTD[0]
    k_prefix, v_prefix = (t[:, : tree.prefix] for t in (k_GTD, v_GTD))
    outputs, start = [], tree.prefix
    if tree.prefix:
        mask = _mask(Fork(trunk=tree.prefix), 0, sliding_window, q_1HTD.device)
        outputs.append(_attend(q_HTD[None, :, :start], k_prefix[None], v_prefix[None], mask, scaling))
    for fork, count in tree.groups():
        end = start + fork.num_tokens * count
        q, k, v = (_forks(t[:, start:end], count) for t in (q_HTD, k_GTD, v_GTD))
        k, v = (
            torch.cat([shared.expand(count, -1, -1, -1), own], 2)
            for shared, own in ((k_prefix, k), (v_prefix, v))
        )
        mask = _mask(fork, tree.prefix, sliding_window, q_1HTD.device)
        outputs.append(_attend(q, k, v, mask, scaling))
        start = end
    return torch.cat(outputs)[None], None


def _attend(
    q_NHLD: torch.Tensor, k_NGMD: torch.Tensor, v_NGMD: torch.Tensor, mask_LM: Any, scaling: float | None
) -> torch.Tensor:
    """(N * L, H, D)."""
    out_NHLD = scaled_dot_product_attention(
        q_NHLD, k_NGMD, v_NGMD, attn_mask=mask_LM, is_causal=mask_LM is None, scale=scaling, enable_gqa=True
    )
    return out_NHLD.transpose(1, 2).flatten(0, 1)


def _forks(t_HSD: torch.Tensor, count: int) -> torch.Tensor:
    """(H, count * L, D) -> (count, H, L, D)."""
    heads, tokens, size = t_HSD.shape
    return t_HSD.view(heads, count, tokens // count, size).transpose(0, 1)


@lru_cache(maxsize=512)
def _mask(fork: Fork, prefix: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(L, P + L) booleans: what each token of a fork sees; None where plain causal attention is the same."""
    is_plain = not prefix and not any(fork.branches)
    if is_plain and (window is None or fork.trunk <= window):
        return None
    own = torch.tensor(positions(fork, prefix), device=device)
    at = torch.cat([torch.arange(prefix, device=device), own])
    branch = torch.repeat_interleave(  # -1: prefix and trunk, which all later positions see
        torch.arange(-1, len(fork.branches)), torch.tensor([fork.trunk, *fork.branches])
    ).to(device)
    path = torch.cat([torch.full((prefix,), -1, device=device), branch])
    distance = own[:, None] - at[None]
    seen = (distance >= 0) & ((path[None] == -1) | (path[None] == branch[:, None]))
    return seen if window is None else seen & (distance < window)
