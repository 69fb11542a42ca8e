"""A pack through a causal LM: from a `Batch` to the arguments of its forward, and to its states.

In: a `Batch`, a transformers model. Out: hidden states of all positions; the layer that they go through next.
Invariant: whatever runs a pack hands over all that any of our attentions asks for, from one place.
Trade-off: a model whose forward takes no arguments beyond its own can't train in packs (StableLM, Nemotron);
`proof` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sftcore.batching.collate import Batch


def pack_arguments(batch: Batch) -> dict[str, Any]:
    """What a model's forward takes for a pack: tokens, and documents in the terms of each attention."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "document_lengths": batch.document_lengths,
    }


def decode_states(causal_lm: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """(1, T, D) last hidden states of a pack."""
    return causal_lm.get_decoder()(**pack_arguments(batch)).last_hidden_state


def output_head(model: PreTrainedModel) -> nn.Module:
    """The vocabulary projection of a causal LM, or the classifier of a `...ForSequenceClassification`."""
    head: nn.Module | None = model.get_output_embeddings()
    return dict(model.named_children()).get("score", model) if head is None else head


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Compute attention by another implementation, known to transformers as `name`, while the block runs."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def placed_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Hold the model on another kind of device while the block runs: CUDA's attentions compute nowhere else.

    It goes back: what cuts it up over the ranks, or keeps it in host memory, starts from there.
    """
    before = model.device
    if device.type == before.type:
        yield
        return
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(before)  # type: ignore[arg-type]
        torch.cuda.empty_cache()


@torch.no_grad()
def states_by_transformers(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """(1, T, D) states of one document under transformers' own plain attention."""
    positions_1T = torch.arange(len(ids_T), device=ids_T.device)[None]
    with attention_set(model, "eager"):
        output = model.get_decoder()(
            input_ids=ids_T[None], position_ids=positions_1T, attention_mask=None, use_cache=False
        )
    return output.last_hidden_state
