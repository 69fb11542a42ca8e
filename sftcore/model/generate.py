"""Decoding in batches, for the probe (sampled) and for evaluation (greedy).

In: prompts as token ids, uniform random numbers if sampling. Out: completions as token ids.
Invariant: a completion depends on its prompt, its own uniforms and the batch it is in; batches are a pure
function of the list of prompts (`batches_by_length`), so ranks, shards and resumed runs decode the same.
Trade-off: one prefill per prompt, whose cache is then repeated for its samples; sampling inverts the
cumulative distribution with one uniform per row and step (softmax + multinomial take 70 % of plain
`generate` on a CPU); finished rows leave the batch, which copies the cache but spares their forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

COMPACT_BELOW = 0.75  # rows leave the batch once fewer than this share is still going


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample.

    Args:
        temperature: divides the logits.
        uniforms: (num_rows, max_new_tokens) float64 in [0, 1), one row per completion.
    """

    temperature: float
    uniforms: np.ndarray


def batches_by_length(prompts: Sequence[Sequence[int]], *, prompts_per_batch: int) -> list[list[int]]:
    """Prompt numbers, shortest first, in batches; equal lengths keep their order.

    >>> batches_by_length([[1, 2, 3], [1], [1, 2]], prompts_per_batch=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + prompts_per_batch] for i in range(0, len(order), prompts_per_batch)]


def stop_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text: the tokenizer's and the generation configuration's end-of-text."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


@torch.inference_mode()
def decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    completions_per_prompt: int = 1,
    sampling: Sampling | None = None,
    is_done: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Complete each prompt `completions_per_prompt` times; greedy without `sampling`.

    Args:
        prompts: (num_prompts,) lists of token ids, none empty.
        stop_ids: a completion ends before the first of these.
        is_done: is_done(row, tokens so far) ends a completion early; called after every token.

    Returns:
        num_prompts * completions_per_prompt lists of token ids, a prompt's completions side by side.
    """
    rows = _Rows(model, prompts, completions_per_prompt)
    completions: list[list[int]] = [[] for _ in range(len(prompts) * completions_per_prompt)]
    for step in range(max_new_tokens):
        uniforms = None if sampling is None else sampling.uniforms[rows.alive, step]
        temperature = 1.0 if sampling is None else sampling.temperature
        tokens = pick_tokens(rows.logits, temperature, uniforms)
        going = []
        for place, (row, token) in enumerate(zip(rows.alive, tokens, strict=True)):
            if row in rows.finished or token in stop_ids:
                continue
            completions[row].append(token)
            if is_done is None or not is_done(row, completions[row]):
                going.append(place)
        if not going or step + 1 == max_new_tokens:
            break
        rows.advance(tokens, going)
    return completions


def pick_tokens(logits: torch.Tensor, temperature: float, uniforms: np.ndarray | None) -> list[int]:
    """The most likely token of each row, or the one at which the cumulative distribution passes the uniform.

    Args:
        logits: (rows, V), any float dtype.
        uniforms: (rows,) in [0, 1), or None for greedy.
    """
    if uniforms is None:
        return logits.argmax(-1).tolist()
    cumulative = torch.softmax(logits.float() / temperature, -1).cumsum(-1)
    target = torch.from_numpy(uniforms).to(cumulative)[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return picked.clamp_(max=logits.shape[-1] - 1).tolist()


class _Rows:
    """The sequences being decoded: their cache, mask and next logits.

    Prompts are padded on the left, so that the newest token of every row is in the last column.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], repeats: int) -> None:
        self.model = model
        device = model.device
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.mask = mask.to(device)
        self.cache = DynamicCache(config=model.config)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.logits = self._forward(ids.to(device), positions)
        if repeats > 1:
            self.cache.batch_repeat_interleave(repeats)
            self.mask = self.mask.repeat_interleave(repeats, 0)
            self.logits = self.logits.repeat_interleave(repeats, 0)
        self.alive = list(range(len(prompts) * repeats))  # row numbers that are still in the batch
        self.finished: set[int] = set()  # of those, the ones whose tokens no longer count

    def advance(self, tokens: list[int], going: list[int]) -> None:
        """Feed the picked tokens; drop the finished rows if they are many.

        Args:
            tokens: one for each place of the batch.
            going: places that go on.
        """
        device = self.model.device
        picked = torch.tensor(tokens, device=device)
        if len(going) < COMPACT_BELOW * len(self.alive):
            keep = torch.tensor(going, device=device)
            self.cache.batch_select_indices(keep)
            self.mask, picked = self.mask[keep], picked[keep]
            self.alive, self.finished = [self.alive[place] for place in going], set()
        else:
            still = {self.alive[place] for place in going}
            self.finished = {row for row in self.alive if row not in still}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        self.logits = self._forward(picked[:, None], positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(rows, V) logits of the last column."""
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
