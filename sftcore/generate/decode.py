"""Decoding in batches, for the probe (sampled) and for evaluation (greedy).

In: prompts as token ids, uniform random numbers if sampling. Out: completions as token ids.
Invariant: a completion depends on its prompt, its own uniforms and the batch it is in; in float32 not even on
that.
Trade-off: completions of a prompt are one row until they part (of 10 by SmolLM2 at temperature 0.7, there are
4 rows after one token and 9 after four), so rows have to be regrouped at every token; that and early stops
save 12 % of the forwards. Sampling inverts the cumulative distribution, one uniform a completion and token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sftcore.generate.api import Decoding, Ids, IsDone
from sftcore.generate.prefix_cache import arrange
from sftcore.generate.rows import decoding_rows

ROWS_PER_CHUNK = 32  # of logits that are sampled from at once: 6 MB in float32 for 49,152 tokens
TOKENS_PER_BLOCK = 256


@dataclass(slots=True)
class _Branch:
    """Completions of one prompt that have the same tokens so far.

    Args:
        source: the row that they were part of.
        prompt: number of the prompt.
        tokens: since the prompt.
        members: numbers of the completions.
    """

    source: int
    prompt: int
    tokens: list[int]
    members: list[int] = field(default_factory=list)


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text: the tokenizer's and the generation configuration's end-of-text."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


@torch.inference_mode()
def decode_batch(model: PreTrainedModel, prompts: Sequence[Ids], decoding: Decoding) -> list[list[int]]:
    """Complete each prompt as `decoding` says, which has to name all tokens that end a text.

    Args:
        prompts: (num_prompts,) lists of token ids, none empty.

    Returns:
        num_prompts * completions_per_prompt lists of token ids, a prompt's completions side by side.
    """
    n = decoding.completions_per_prompt
    completions: list[list[int]] = [[] for _ in range(len(prompts) * n)]
    branches = [_Branch(p, p, [], list(range(p * n, p * n + n))) for p in range(len(prompts))]
    sizes = {"max_rows": len(completions), "max_new_tokens": decoding.max_new_tokens}
    with decoding_rows(model, prompts, **sizes) as rows:
        for step in range(decoding.max_new_tokens):
            grown = _grow(branches, rows.logits, decoding, step)
            grown = [branch for branch in grown if branch.tokens[-1] not in decoding.stop_ids]
            for branch in grown:
                for member in branch.members:
                    completions[member] = branch.tokens
            going = _going_on(grown, decoding.is_done)
            if not going or step + 1 == decoding.max_new_tokens:
                break
            branches = [going[i] for i in arrange([branch.source for branch in going])]
            rows.advance([branch.source for branch in branches], [branch.tokens[-1] for branch in branches])
    return [list(tokens) for tokens in completions]


def _grow(branches: Sequence[_Branch], logits: torch.Tensor, decoding: Decoding, step: int) -> list[_Branch]:
    """Give every completion its next token; branches part where the tokens differ."""
    if not decoding.temperature:
        tokens = logits.argmax(-1).tolist()
        return [
            _Branch(row, branch.prompt, [*branch.tokens, token], branch.members)
            for row, (branch, token) in enumerate(zip(branches, tokens, strict=True))
        ]
    row_of = [row for row, branch in enumerate(branches) for _ in branch.members]
    members = [member for branch in branches for member in branch.members]
    assert decoding.uniforms is not None, "what it is sampled by"
    picked = pick_tokens(logits, decoding.temperature, decoding.uniforms[members, step], row_of)
    grown: dict[tuple[int, int], _Branch] = {}
    for member, row, token in zip(members, row_of, picked, strict=True):
        if (row, token) not in grown:
            grown[row, token] = _Branch(row, branches[row].prompt, [*branches[row].tokens, token])
        grown[row, token].members.append(member)
    return list(grown.values())


def _going_on(branches: list[_Branch], is_done: IsDone | None) -> list[_Branch]:
    if is_done is None or not branches:
        return branches
    done = is_done([branch.prompt for branch in branches], [branch.tokens for branch in branches])
    return [branch for branch, ends in zip(branches, done, strict=True) if not ends]


def pick_tokens(
    logits: torch.Tensor, temperature: float, uniforms: np.ndarray, row_of: Sequence[int] | None = None
) -> list[int]:
    """The token at which the cumulative distribution of a row passes the uniform.

    Sums of blocks of tokens are looked up first, then the tokens of one block, so that no cumulative sum runs
    over the vocabulary. A token of probability 0 is never picked.

    Args:
        logits: (rows, V), any float dtype.
        uniforms: (picks,) in [0, 1).
        row_of: (picks,) the row of each, ascending; None: one pick a row.
    """
    chosen = np.arange(len(logits)) if row_of is None else np.asarray(row_of)
    picked = []
    for first in range(0, len(logits), ROWS_PER_CHUNK):
        start, end = np.searchsorted(chosen, [first, first + ROWS_PER_CHUNK])
        weights = _weights(logits[first : first + ROWS_PER_CHUNK], temperature)
        rows = torch.from_numpy(chosen[start:end] - first).to(logits.device)
        picked.append(_invert(weights, rows, torch.from_numpy(uniforms[start:end]).to(logits.device)))
    return torch.cat(picked).tolist()


def _weights(logits_RV: torch.Tensor, temperature: float) -> torch.Tensor:
    """(R, B, TOKENS_PER_BLOCK) float32, in proportion to the probabilities; 0 beyond the vocabulary."""
    rows, vocabulary = logits_RV.shape
    blocks = -(-vocabulary // TOKENS_PER_BLOCK)
    weights = torch.zeros(rows, blocks * TOKENS_PER_BLOCK, device=logits_RV.device)
    used = weights[:, :vocabulary]
    used.copy_(logits_RV).sub_(logits_RV.amax(-1, keepdim=True)).div_(temperature).exp_()
    return weights.view(rows, blocks, TOKENS_PER_BLOCK)


def _invert(weights_RBT: torch.Tensor, row_N: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """(N,) tokens."""
    sums_NB = weights_RBT.sum(-1).double()[row_N]
    ends_NB = sums_NB.cumsum(-1)
    target_N = torch.minimum(uniform_N * ends_NB[:, -1], _just_below(ends_NB[:, -1]))
    block_N = torch.searchsorted(ends_NB, target_N[:, None], right=True)
    mass_N, end_N = (t.gather(1, block_N)[:, 0] for t in (sums_NB, ends_NB))
    inside_NT = weights_RBT[row_N, block_N[:, 0]].double().cumsum(-1)
    share_N = ((target_N - (end_N - mass_N)) / mass_N).clamp(0, 1)
    inside_target_N = torch.minimum(share_N * inside_NT[:, -1], _just_below(inside_NT[:, -1]))
    token_N = torch.searchsorted(inside_NT, inside_target_N[:, None], right=True)
    return (block_N * TOKENS_PER_BLOCK + token_N)[:, 0]


def _just_below(t: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(t, torch.zeros_like(t))
