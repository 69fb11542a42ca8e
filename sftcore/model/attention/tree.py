"""Attention over a tree of texts: each goes on from what it begins with in another, and may part again.

In: q, k, v of a pack laid out as below, and its shape. Out: attention of each path from the root alone.
Invariant: a token sees what leads to it and nothing else, as if its path stood alone; no score between two
prompts, or between two continuations of one prompt, is ever kept.
Trade-off: forks of similar length share one call, padded to the longest, whose keys are gathered for each
fork: for 100 pairs of 35 tokens and a call's overhead, five calls a layer cost less than one for each of 60
shapes, though a quarter of their rows are pads.

    prompt 0 | continuation 0.0 | continuation 0.1 | rest of prompt 1 | continuation 1.0 | ...

Shapes: T tokens of the pack, N forks of a call, L their longest, P the longest that leads to one, M = P + L;
H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from sftcore.model.attention.needs import AttentionNeeds, refuse_unapplied
from sftcore.model.attention.sdpa_docs import lacks as lacks_of_sdpa

NAME = "sftcore_tree"
TRUNK, PAD = -1, -2  # branch numbers of tokens that all later ones see, and of none
MAX_WRITTEN_SCORES = 2**22  # 16 MB
MAX_GATHERED = 2**17  # keys of a call: 50 MB with 3 heads of 64 in bfloat16, 270 MB with 8 of 128
LENGTH_RATIO = 1.5  # of the longest to the shortest fork of a call


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """Tokens that lie together in a pack: `trunk` of them and then `branches` side by side.

    Args:
        start: where the first lies.
        before: (P,) where the tokens that lead to it lie, from the root.
        trunk: tokens that all branches see, at least one.
        branches: tokens of each branch.
    """

    start: int
    before: np.ndarray
    trunk: int
    branches: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.trunk + sum(self.branches)

    def positions(self) -> np.ndarray:
        """(L,) position of each token on its path from the root.

        >>> Fork(start=9, before=np.arange(4), trunk=3, branches=(1, 2)).positions()
        array([4, 5, 6, 7, 7, 8])
        """
        own = [np.arange(self.trunk), *(self.trunk + np.arange(branch) for branch in self.branches)]
        return np.concatenate(own) + len(self.before)

    def path(self) -> np.ndarray:
        """(P + trunk,) where the tokens lie that lead to the end of the trunk, from the root."""
        return np.concatenate([self.before, np.arange(self.start, self.start + self.trunk)])

    def branch_numbers(self) -> np.ndarray:
        """(L,) number of the branch that a token is on, or TRUNK."""
        return np.repeat(np.arange(-1, len(self.branches)), [self.trunk, *self.branches])


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of scaled_dot_product_attention: N forks, padded to L and M.

    Args:
        num_forks: N.
        queries: (N * L,) int64, which tokens of the pack ask; pads ask as token 0.
        keys: (N * M,) int64, which tokens are asked.
        mask_N1LM: booleans, what each sees; None where plain causal attention is the same.
    """

    num_forks: int
    queries: torch.Tensor
    keys: torch.Tensor
    mask_N1LM: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The calls of a pack, and where each token's result lies among theirs."""

    calls: tuple[Call, ...]
    places_T: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Tree:
    """The shape of a pack: forks that cover its tokens, each once."""

    forks: Sequence[Fork]
    _plans: dict[Any, Plan] = field(default_factory=dict)

    def plan(self, window: int | None, device: torch.device) -> Plan:
        """How to compute it under a sliding window; all layers of a forward share one plan."""
        if (window, device) not in self._plans:
            self._plans[window, device] = _plan(self.forks, window, device)
        return self._plans[window, device]


def register_tree_attention() -> str:
    """Make it known to transformers; returns the name to load a model with."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    return NAME


def lacks(needs: AttentionNeeds) -> list[str]:
    """Why a model's attention can't be computed so; empty if it can."""
    return lacks_of_sdpa(needs)


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
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it; see the module's docstring.

    Args:
        tree: handed through the model's forward; its tokens sum to T.
        sliding_window: a position sees itself and the sliding_window - 1 positions before it, on its path.

    Returns:
        (1, T, H, D) and None (no attention weights).

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    q_THD, k_TGD, v_TGD = (t[0].transpose(0, 1) for t in (q_1HTD, k_1GTD, v_1GTD))
    plan = tree.plan(sliding_window, q_1HTD.device)
    outputs = []
    for call in plan.calls:
        q_NHLD = _gather(q_THD, call.queries, call.num_forks)
        k_NGMD, v_NGMD = (_gather(t, call.keys, call.num_forks) for t in (k_TGD, v_TGD))
        outputs.append(_attend(q_NHLD, k_NGMD, v_NGMD, call.mask_N1LM, scaling))
    return torch.cat(outputs).index_select(0, plan.places_T)[None], None


def _attend(
    q_NHLD: torch.Tensor,
    k_NGMD: torch.Tensor,
    v_NGMD: torch.Tensor,
    mask_N1LM: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """(N * L, H, D); few scores on a CPU are written out: 2.3 instead of 3.3 ms for 30 forks of 35 tokens."""
    forks, heads, length, size = q_NHLD.shape
    groups, width = k_NGMD.shape[1:3]
    if mask_N1LM is None or q_NHLD.is_cuda or forks * heads * length * width > MAX_WRITTEN_SCORES:
        out_NHLD = scaled_dot_product_attention(
            *(q_NHLD, k_NGMD, v_NGMD),
            attn_mask=mask_N1LM,
            is_causal=mask_N1LM is None,
            scale=scaling,
            enable_gqa=True,
        )
    else:
        scale = size**-0.5 if scaling is None else scaling
        q_NGXD = (q_NHLD.float() * scale).reshape(forks, groups, -1, size)
        scores = (q_NGXD @ k_NGMD.float().transpose(-1, -2)).view(forks, heads, length, width)
        weights = torch.softmax(scores.masked_fill_(~mask_N1LM, -torch.inf), -1)
        out_NGXD = weights.view(forks, groups, -1, width) @ v_NGMD.float()
        out_NHLD = out_NGXD.view(forks, heads, length, -1).to(q_NHLD.dtype)
    return out_NHLD.transpose(1, 2).flatten(0, 1)


def _gather(t_THD: torch.Tensor, tokens: torch.Tensor, num_forks: int) -> torch.Tensor:
    """(N, H, L, D) of N * L tokens."""
    return t_THD.index_select(0, tokens).unflatten(0, (num_forks, -1)).transpose(1, 2)


def _plan(forks: Sequence[Fork], window: int | None, device: torch.device) -> Plan:
    places_T = np.empty(sum(fork.num_tokens for fork in forks), dtype=np.int64)
    calls, end = [], 0
    for run in _runs(forks):
        width = max(fork.num_tokens for fork in run)
        for row, fork in enumerate(run):
            first = end + row * width
            places_T[fork.start : fork.start + fork.num_tokens] = np.arange(first, first + fork.num_tokens)
        end += len(run) * width
        calls.append(_call(run, width, window, device))
    return Plan(calls=tuple(calls), places_T=torch.from_numpy(places_T).to(device))


def _runs(forks: Sequence[Fork]) -> Iterator[list[Fork]]:
    """Forks of similar length, by length and by what leads to them; at most half of a run's keys are pads."""
    run: list[Fork] = []
    keys = before = 0
    for fork in sorted(forks, key=lambda fork: (fork.num_tokens, len(fork.before))):
        size = fork.num_tokens + len(fork.before)
        gathered = (max(before, len(fork.before)) + fork.num_tokens) * (len(run) + 1)  # N * M
        too_long = run and fork.num_tokens > LENGTH_RATIO * run[0].num_tokens + 2
        if run and (too_long or gathered > min(2 * (keys + size), MAX_GATHERED)):
            yield run
            run, keys, before = [], 0, 0
        run.append(fork)
        keys, before = keys + size, max(before, len(fork.before))
    yield run


def _call(run: list[Fork], width: int, window: int | None, device: torch.device) -> Call:
    """The call for forks that are padded to `width` tokens."""
    before = max(len(fork.before) for fork in run)
    queries_NL, keys_NM = np.zeros((len(run), width), int), np.zeros((len(run), before + width), int)
    at_NM, branch_NM = np.zeros_like(keys_NM), np.full_like(keys_NM, PAD)
    for row, fork in enumerate(run):
        own = slice(before, before + fork.num_tokens)
        queries_NL[row, : fork.num_tokens] = np.arange(fork.start, fork.start + fork.num_tokens)
        keys_NM[row, own] = queries_NL[row, : fork.num_tokens]
        keys_NM[row, : len(fork.before)] = fork.before
        at_NM[row, own], at_NM[row, : len(fork.before)] = fork.positions(), np.arange(len(fork.before))
        branch_NM[row, own], branch_NM[row, : len(fork.before)] = fork.branch_numbers(), TRUNK
    is_plain = len(run) == 1 and not before and not any(run[0].branches)
    if is_plain and (window is None or width <= window):
        mask = None
    else:
        mask = torch.from_numpy(_seen(at_NM, branch_NM, before, window))[:, None].to(device)
    queries, keys = (torch.from_numpy(t.reshape(-1)).to(device) for t in (queries_NL, keys_NM))
    return Call(num_forks=len(run), queries=queries, keys=keys, mask_N1LM=mask)


def _seen(at_NM: np.ndarray, branch_NM: np.ndarray, before: int, window: int | None) -> np.ndarray:
    """(N, L, M) booleans: what each token sees; a pad sees all, so that its softmax is a number."""
    distance = at_NM[:, before:, None] - at_NM[:, None]
    asking_NL1, asked_N1M = branch_NM[:, before:, None], branch_NM[:, None]
    seen = (distance >= 0) & ((asked_N1M == TRUNK) | (asked_N1M == asking_NL1))
    if window is not None:
        seen &= distance < window
    return seen | (asking_NL1 == PAD)
