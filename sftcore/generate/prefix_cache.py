"""Rows that are decoded together while rows of one prompt share the prompt's keys and values.

In: prompts as token ids, then step by step which row goes on with which token. Out: next logits of each row.
Invariant: a row's logits are those of its whole text under the model's own attention; `proves_equal` checks
that on each model, and one for which it fails decodes with transformers' cache (`CachedRows`).
Trade-off: keys and values of a prompt lie once for all of its completions, and new ones are written in place,
where transformers' cache repeats them per completion and copies everything at every token. For 64 prompts of
15 tokens with 10 completions each, SmolLM2 in bfloat16 (23,040 bytes a token) holds 22 MB for prompts instead
of 221 MB; the price is two products per layer instead of one.

Shapes: P prompts, L prompt tokens but the last, R rows, H query heads in G groups of g (one key/value head a
group), D head size, S columns for a row's own tokens (the prompt's last one first), m rows of a prompt at
most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from sftcore.model.attention.needs import refuse_unapplied
from sftcore.model.forward import attention_set
from sftcore.model.miniature import BREAKS

log = logging.getLogger(__name__)
NAME = "sftcore_shared_prefix"
DROP_PROMPTS_BELOW = 0.75  # prompts without rows go once fewer than this share still has some
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.2  # of the proof, relative to the norm of the logits
_PROVEN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class PrefixCache:
    """Keys and values of prompts and of rows, layer by layer, and which row belongs to which prompt.

    Args:
        lengths_P: prompt tokens but the last.
        prompt_of_R: prompt number of each row.
        max_rows: rows that there will be at most.
        max_columns: S.
    """

    def __init__(self, lengths_P: torch.Tensor, *, max_rows: int, max_columns: int) -> None:
        self.lengths_P, self.max_rows, self.max_columns = lengths_P, max_rows, max_columns
        self.prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> k and v (P, G, L, D)
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> k and v (max_rows, G, S, D)
        self.column = -1  # where the token being fed goes; -1 while prompts are read
        self.group(np.arange(len(lengths_P)))

    def group(self, prompt_of_R: np.ndarray) -> None:
        """Say which prompt each row belongs to; prompts without rows are dropped once they are many."""
        live, prompt_of_R = np.unique(prompt_of_R, return_inverse=True)
        if len(live) < DROP_PROMPTS_BELOW * len(self.lengths_P):
            keep = torch.from_numpy(live).to(self.lengths_P.device)
            self.lengths_P = self.lengths_P[keep]
            self.prompts = {layer: (k[keep], v[keep]) for layer, (k, v) in self.prompts.items()}
        else:
            prompt_of_R = live[prompt_of_R]
        self.prompt_of_R = prompt_of_R
        self.per_prompt, place_R = _places(prompt_of_R, len(self.lengths_P))
        in_order = np.array_equal(place_R, np.arange(len(self.lengths_P) * self.per_prompt))
        self.place_R = None if in_order else torch.from_numpy(place_R).to(self.lengths_P.device)
        self.biases: dict[int | None, torch.Tensor] = {}

    def move(self, sources: Sequence[int]) -> None:
        """Let row i hold what row sources[i] held; a row that is overwritten must not be a source."""
        moved = [(row, source) for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        rows, origins = torch.tensor(moved, device=self.lengths_P.device).unbind(1)
        for tensors in self.rows.values():
            for t in tensors:
                t[rows, :, : self.column + 1] = t[origins, :, : self.column + 1]

    def store(self, layer: int, k_RG1D: torch.Tensor, v_RG1D: torch.Tensor) -> None:
        """Write the keys and values of the tokens being fed."""
        if layer not in self.rows:
            shape = (self.max_rows, k_RG1D.shape[1], self.max_columns)
            self.rows[layer] = (
                k_RG1D.new_empty(*shape, k_RG1D.shape[-1]),
                v_RG1D.new_empty(*shape, v_RG1D.shape[-1]),
            )
        for buffer, new in zip(self.rows[layer], (k_RG1D, v_RG1D), strict=True):
            buffer[: len(new), :, self.column] = new[:, :, 0]

    def bias(self, window: int | None, width: int) -> torch.Tensor:
        """(P, 1, 1, width) float32: -inf where a prompt has no token, or one that lies before the window."""
        if window not in self.biases:
            position = torch.arange(width, device=self.lengths_P.device)
            seen = position < self.lengths_P[:, None]
            if window is not None:
                seen &= position > self.lengths_P[:, None] + self.column - window
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            self.biases[window] = bias[:, None, None]
        return self.biases[window]


def _places(prompt_of_R: np.ndarray, num_prompts: int) -> tuple[int, np.ndarray]:
    """m, and where each row stands in a table of m places for each prompt.

    >>> _places(np.array([0, 1, 0, 1, 1]), 2)
    (3, array([0, 3, 1, 4, 5]))
    """
    counts = np.bincount(prompt_of_R, minlength=num_prompts)
    by_prompt = np.argsort(prompt_of_R, kind="stable")
    starts = np.cumsum(counts) - counts
    rank = np.empty_like(prompt_of_R)
    rank[by_prompt] = np.arange(len(prompt_of_R)) - np.repeat(starts, counts)
    per_prompt = int(counts.max())
    return per_prompt, prompt_of_R * per_prompt + rank


def shared_prefix_attention(
    module: torch.nn.Module,
    q_RHTD: torch.Tensor,
    k_RGTD: torch.Tensor,
    v_RGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_cache: PrefixCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' AttentionInterface wants it: of whole prompts, then of one token a row.

    Returns:
        (R, T, H, D) and None (no attention weights).

    Raises:
        ValueError: the layer wants what this attention would drop.
    """
    refuse_unapplied(module, attention_mask, extras)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = q_RHTD.shape[-1] ** -0.5 if scaling is None else scaling
    if prefix_cache.column < 0:
        prefix_cache.prompts[layer] = (k_RGTD.contiguous(), v_RGTD.contiguous())
        mask = _window_mask(q_RHTD.shape[2], sliding_window, q_RHTD.device)
        out = scaled_dot_product_attention(
            q_RHTD, k_RGTD, v_RGTD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None
    prefix_cache.store(layer, k_RGTD, v_RGTD)
    groups = k_RGTD.shape[1]
    q_RGgD = q_RHTD.reshape(len(q_RHTD), groups, -1, q_RHTD.shape[-1]) * scale
    out_RGgD = _attend(q_RGgD, prefix_cache, layer, sliding_window)
    return out_RGgD.flatten(1, 2)[:, None], None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(L, L) boolean band, or None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    return (distance >= 0) & (distance < window)


def _attend(q_RGgD: torch.Tensor, cache: PrefixCache, layer: int, window: int | None) -> torch.Tensor:
    """(R, G, g, D): one softmax over the prompt's tokens and the row's own."""
    end = cache.column + 1
    start = 0 if window is None else max(0, end - window)
    k_RGSD, v_RGSD = (t[: len(q_RGgD), :, start:end] for t in cache.rows[layer])
    own = (q_RGgD @ k_RGSD.transpose(-1, -2)).float()
    if layer not in cache.prompts:  # every prompt is one token
        return torch.softmax(own, -1).to(q_RGgD.dtype) @ v_RGSD
    k_PGLD, v_PGLD = cache.prompts[layer]
    width = k_PGLD.shape[2]
    shared = _by_prompt(q_RGgD, cache) @ k_PGLD.transpose(-1, -2)  # (P, G, m * g, L)
    shared = shared.float() + cache.bias(window, width)
    weights = torch.softmax(torch.cat([_by_row(shared, cache), own], -1), -1).to(q_RGgD.dtype)
    of_prompt, of_row = weights.split([width, end - start], -1)
    return _by_row(_by_prompt(of_prompt, cache) @ v_PGLD, cache) + of_row @ v_RGSD


def _by_prompt(t_RGgX: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
    """(P, G, m * g, X): rows of a prompt side by side; places that no row takes are 0."""
    num_prompts, m = len(cache.lengths_P), cache.per_prompt
    if cache.place_R is not None:
        table = t_RGgX.new_zeros(num_prompts * m, *t_RGgX.shape[1:])
        t_RGgX = table.index_copy_(0, cache.place_R, t_RGgX)
    _, groups, g, x = t_RGgX.shape
    return t_RGgX.view(num_prompts, m, groups, g, x).transpose(1, 2).reshape(num_prompts, groups, m * g, x)


def _by_row(t_PGNX: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
    """(R, G, g, X): the way back from `_by_prompt`."""
    num_prompts, groups, n, x = t_PGNX.shape
    m = cache.per_prompt
    table = t_PGNX.view(num_prompts, groups, m, n // m, x).transpose(1, 2).flatten(0, 1)
    return table if cache.place_R is None else table.index_select(0, cache.place_R)


class SharedPrefixRows:
    """Rows whose prompts are held once; the model must be under `shared_prefix(model)`.

    Args:
        prompts: (P,) lists of token ids, none empty.
        max_rows: rows that there will be at most.
        max_new_tokens: calls of `advance` that there will be at most, plus one.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_rows: int, max_new_tokens: int
    ) -> None:
        self.model = model
        lengths = [len(prompt) - 1 for prompt in prompts]
        self.cache = PrefixCache(
            torch.tensor(lengths, device=model.device), max_rows=max_rows, max_columns=max_new_tokens
        )
        self.length_R = np.array(lengths)  # tokens before the one being fed
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt[:-1])
        if max(lengths):
            self._read_prompts(ids.to(model.device))
        self.logits = self._feed([prompt[-1] for prompt in prompts])

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> None:
        """Let row i go on from row sources[i] with tokens[i]; rows that are no source end.

        Args:
            sources: as `PrefixCache.move` wants them: see `arrange`.
        """
        self.cache.move(sources)
        self.length_R = self.length_R[list(sources)] + 1
        self.cache.group(self.cache.prompt_of_R[list(sources)])
        self.logits = self._feed(tokens)

    def _read_prompts(self, ids_PL: torch.Tensor) -> None:
        positions = torch.arange(ids_PL.shape[1], device=ids_PL.device).expand_as(ids_PL)
        decoder = self.model.get_decoder()
        decoder(input_ids=ids_PL, position_ids=positions, use_cache=False, prefix_cache=self.cache)

    def _feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """(R, V) logits after one more token a row."""
        self.cache.column += 1
        device = self.model.device
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=torch.from_numpy(self.length_R).to(device)[:, None],
            use_cache=False,
            prefix_cache=self.cache,
        )
        return output.logits[:, -1]


class CachedRows:
    """The same rows with transformers' own cache, for models whose attention can't be replaced.

    Prompts are padded on the left, so that the newest token of every row is in the last column.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, device = model, model.device
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.mask = mask.to(device)
        self.cache = DynamicCache(config=model.config)
        self.logits = self._feed(ids.to(device), (self.mask.cumsum(-1) - 1).clamp(min=0))

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> None:
        """As `SharedPrefixRows.advance`."""
        device = self.model.device
        if list(sources) != list(range(len(self.mask))):
            keep = torch.tensor(sources, device=device)
            self.cache.batch_select_indices(keep)
            self.mask = self.mask[keep]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], -1)
        ids = torch.tensor(tokens, device=device)[:, None]
        self.logits = self._feed(ids, self.mask.sum(-1, keepdim=True) - 1)

    def _feed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def arrange(sources: Sequence[int]) -> list[int]:
    """Order of the rows to be, so that as few as possible move: result[i] is the number of the one at i.

    No row that is overwritten is then a source of another: a source below the new number of rows keeps one.

    >>> arrange([0, 0, 2])  # two go on from row 0, one from row 2: the second takes the place of row 1
    [0, 1, 2]
    >>> arrange([1, 2, 2])
    [2, 0, 1]
    """
    order = [-1] * len(sources)
    movers = []
    for number, source in enumerate(sources):
        if source < len(order) and order[source] < 0:
            order[source] = number
        else:
            movers.append(number)
    left = iter(movers)
    return [next(left) if number < 0 else number for number in order]


@contextmanager
def shared_prefix(model: PreTrainedModel) -> Iterator[bool]:
    """Decode with shared prefixes while the block runs; yields False, changing nothing, where that fails."""
    if model not in _PROVEN:
        _PROVEN[model] = proves_equal(model)
        if not _PROVEN[model]:
            log.warning("%s decodes with transformers' own cache: slower", model.config.model_type)
    if not _PROVEN[model]:
        yield False
        return
    with _own_attention(model):
        yield True


def _own_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    AttentionInterface.register(NAME, shared_prefix_attention)
    return attention_set(model, NAME)


@torch.inference_mode()
def proves_equal(model: PreTrainedModel) -> bool:
    """Whether shared prefixes give this model's own logits: two prompts, three rows, three tokens each."""
    vocabulary = model.config.get_text_config().vocab_size
    texts = [[i * 7 % vocabulary for i in range(1, n)] for n in (7, 5, 7)]
    texts[2][-1] = 3 % vocabulary  # the same prompt as the first, another ending
    alone = (torch.tensor([text], device=model.device) for text in texts)
    own = [model(input_ids=ids, use_cache=False).logits[0, -1].float() for ids in alone]
    try:
        with _own_attention(model):
            prompts = [texts[0][:-2], texts[1][:-2]]
            rows = SharedPrefixRows(model, prompts, max_rows=3, max_new_tokens=3)
            rows.advance([0, 1], [texts[0][-2], texts[1][-2]])
            rows.advance([0, 1, 0], [text[-1] for text in texts])
    except BREAKS as error:
        log.debug("no shared prefixes: %s", error)
        return False
    return agree(rows.logits.float(), torch.stack(own), model.dtype)


def agree(ours_RV: torch.Tensor, own_RV: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal: those of every row in float32, of the middle row in lower precisions.

    There rounding alone can throw a row far off: of SmolLM2's three in bfloat16, 4, 8 and 18 % (a tuned one:
    5, 5, 66 %); a wrong attention threw all of them off by 66 % and more.
    """
    centred_RV = own_RV - own_RV.mean(-1, keepdim=True)
    off_R = (ours_RV - own_RV).norm(dim=-1) / centred_RV.norm(dim=-1)
    is_exact = dtype == torch.float32
    worst, tolerance = (off_R.max(), TOLERANCE) if is_exact else (off_R.median(), LOW_PRECISION_TOLERANCE)
    log.debug("shared prefixes: logits differ by %.2g of their norm, %.2g is allowed", worst, tolerance)
    return bool(worst < tolerance)
