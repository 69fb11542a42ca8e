"""Rows that are decoded together: by the quickest way that gives a model's rows their own logits.

In: a model, prompts as token ids. Out: rows with the next logits of each, as `SharedPrefixRows` has them.
Invariant: a way is taken only after it gave this model, on a few tokens, the logits of texts read alone; and
none that shares a forward where a text may pass a length beyond which others would be computed otherwise.
Trade-off: what neither shared prefixes nor transformers' cache decode right (state-space layers see the pads;
LongRoPE goes by the longest text) is read whole again for every token: as slow as it sounds, and right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from sftcore.generate.prefix_cache import CachedRows, SharedPrefixRows, agree, shared_prefix
from sftcore.model.loss import CHUNK_ELEMENTS
from sftcore.model.miniature import BREAKS
from sftcore.model.trial import bound_length

log = logging.getLogger(__name__)
Rows = SharedPrefixRows | CachedRows
_CACHED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
PROVEN = (8, 4, 5)  # tokens of the texts: most are padded next to the longest


class WholeRows:
    """Rows whose whole texts are read again for each token, next to none of another length."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.texts = [list(prompt) for prompt in prompts]
        self.logits = self._read()

    def advance(self, sources: Sequence[int], tokens: Sequence[int]) -> None:
        """As `SharedPrefixRows.advance`."""
        self.texts = [[*self.texts[source], token] for source, token in zip(sources, tokens, strict=True)]
        self.logits = self._read()

    def _read(self) -> torch.Tensor:
        """(R, V) logits after each text."""
        found: dict[int, torch.Tensor] = {}
        for length in {len(text) for text in self.texts}:
            rows = [row for row, text in enumerate(self.texts) if len(text) == length]
            vocabulary = self.model.config.get_text_config().vocab_size
            size = max(1, CHUNK_ELEMENTS // (length * vocabulary))
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                ids = torch.tensor([self.texts[row] for row in part], device=self.model.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
                found |= dict(zip(part, logits, strict=True))
        return torch.stack([found[row] for row in range(len(self.texts))])


@contextmanager
def decoding_rows(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_rows: int, max_new_tokens: int
) -> Iterator[Rows | WholeRows]:
    """Rows of these prompts; the model decodes so while the block runs.

    Args:
        max_rows: rows that there will be at most.
        max_new_tokens: calls of `advance` that there will be at most, plus one.
    """
    bound = bound_length(model.config)
    if bound is not None and max(map(len, prompts)) + max_new_tokens > bound:
        yield WholeRows(model, prompts)
        return
    with shared_prefix(model) as is_shared:
        if is_shared:
            yield SharedPrefixRows(model, prompts, max_rows=max_rows, max_new_tokens=max_new_tokens)
        else:
            yield lone_or_cached_rows(model, prompts)


def lone_or_cached_rows(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> CachedRows | WholeRows:
    """Rows with transformers' own cache if this model's are right so, else texts that are read whole."""
    if model not in _CACHED:
        _CACHED[model] = _proves(model, lambda texts: CachedRows(model, texts))
        if not _CACHED[model]:
            kind = model.config.model_type
            log.warning("%s reads whole texts for every token: pads or others would change them", kind)
    bound = bound_length(model.config)
    is_long = bound is not None and max(map(len, prompts)) > bound
    return CachedRows(model, prompts) if _CACHED[model] and not is_long else WholeRows(model, prompts)


@torch.inference_mode()
def _proves(model: PreTrainedModel, make: Callable[[list[list[int]]], CachedRows]) -> bool:
    """Whether three texts get their own logits, though two are padded, rows change places and one ends."""
    vocabulary = model.config.get_text_config().vocab_size
    texts = [[(i + 3) * (7 + n) % vocabulary for i in range(n)] for n in PROVEN]
    own = torch.stack([WholeRows(model, [text]).logits[0].float() for text in texts])
    try:
        rows = make([text[:-2] for text in texts])
        rows.advance([2, 1, 0], [texts[row][-2] for row in (2, 1, 0)])
        rows.advance([1, 0], [texts[1][-1], texts[2][-1]])
    except BREAKS as error:
        log.debug("rows can't be cached: %r", error)
        return False
    return agree(rows.logits.float(), own[[1, 2]], model.dtype)
