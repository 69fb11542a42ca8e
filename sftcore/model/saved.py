"""What autograd keeps of a forward: counted on the meta device, or on a miniature.

In: a model without values. Out: bytes for each token, of all layers, of the largest and of their inputs.
Invariant: the model's own code runs, with attention that keeps what fused kernels keep.
Trade-off: 64 tokens once, 0.1 s; code that reads values (experts that are looked up, say) is counted on a
miniature and scaled by width and depth, which is right to some 20 %.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from sftcore.model.miniature import build, shrink
from sftcore.model.ours import slim_layers

COUNTED_TOKENS = 64
COUNTED = "sftcore_counted"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBytes:
    """Bytes that autograd keeps of one token."""

    all_layers: int
    dearest_layer: int
    inputs: int


def saved_bytes(model: Any, config: Any, kind: Any, *, calls_products: bool) -> SavedBytes:
    """`count_saved_bytes` on meta; where code reads values, a miniature's, scaled by width and depth."""
    try:
        return count_saved_bytes(model, calls_products=calls_products)
    except RuntimeError as error:
        log.info("%s is counted on a miniature: %s", config.model_type, str(error).splitlines()[0])
    small = shrink(config)
    saved = count_saved_bytes(build(small, kind), calls_products=calls_products)
    text, small_text = config.get_text_config(), small.get_text_config()
    width = text.hidden_size / small_text.hidden_size
    depth = text.num_hidden_layers / small_text.num_hidden_layers
    return SavedBytes(
        all_layers=int(saved.all_layers * width * depth),
        dearest_layer=int(saved.dearest_layer * width),
        inputs=int(saved.inputs * width * depth),
    )


class _CountedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: queries, keys, values, output, and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # laid out as kernels do
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out


def _counted_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _CountedAttention.apply(query, key, value).transpose(1, 2), None


def count_saved_bytes(model: Any, *, calls_products: bool = False) -> SavedBytes:
    """What autograd keeps per token of a forward, by running one on the meta device.

    Args:
        model: a causal LM, on the meta device where its code reads no values; it is converted to bfloat16.
        calls_products: give every product a hook, as ZeRO-3 does.
    """
    AttentionInterface.register(COUNTED, _counted_attention)  # without a mask of that name none is made
    model.to(torch.bfloat16).train().set_attn_implementation(COUNTED)
    slim_layers(model)
    products = [m for m in model.modules() if calls_products and type(m) is torch.nn.Linear]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors stay, so that no identity is used twice
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    marks: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    hooks = [layer.register_forward_pre_hook(lambda *_: marks.append(total())) for layer in layers]
    hooks += [product.register_forward_hook(lambda *_: None) for product in products]
    ids = torch.ones(1, COUNTED_TOKENS, dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state = model.get_decoder()(
            input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False
        ).last_hidden_state
    for hook in hooks:
        hook.remove()
    each = [after - before for before, after in pairwise([*marks, total()])]
    return SavedBytes(
        all_layers=total() // COUNTED_TOKENS,
        dearest_layer=max(each, default=0) // COUNTED_TOKENS,
        inputs=len(layers) * state.element_size() * state.shape[-1],
    )
