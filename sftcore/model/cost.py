"""Cost: a model's configuration -> FLOPs of a pack, bytes of training state. The one owner of these numbers.

In: a transformers configuration. Out: `ModelCost`, from which the schedule balances ranks and the plan
predicts.
Invariant: counts come from the model itself, built on the meta device, not from a formula per architecture.
Trade-off: building on meta takes about 0.1 s for 30 layers and no memory, and is exact for any
architecture.

FLOPs of a forward and backward, 2 for each multiply-add, pads excluded:

    6 N_body tokens + 6 h V trained_tokens + 6 L h_attn sum(len_i^2)

the last term being the two causal products (half of 12 L h_attn len^2; PaLM, arXiv 2204.02311, appendix B).
Where a layer has a sliding window w, len^2 / 2 becomes the number of pairs in the band.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sftcore.batching.schedule import CostCoefficients
from sftcore.config import AdapterSettings
from sftcore.model.adapters import add_adapter

FLOPS_PER_WEIGHT = 6  # 2 forward, 4 backward
FLOPS_PER_FROZEN_WEIGHT = 4  # 2 forward, 2 backward: only the gradient of its input
ADAM_STATE_BYTES = 12  # float32 master weight and two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Sizes that costs follow from.

    Args:
        num_parameters: all, tied ones once.
        num_body_parameters: without input embedding and output layer.
        hidden_size: h.
        vocabulary: V, rows of the output layer.
        num_layers: L.
        attention_width: h_attn = query heads * head size.
        num_trained_parameters: all of them, or an adapter's.
    """

    num_parameters: int
    num_body_parameters: int
    hidden_size: int
    vocabulary: int
    num_layers: int
    attention_width: int
    num_trained_parameters: int

    @property
    def coefficients(self) -> CostCoefficients:
        """For balancing packs, in FLOPs: frozen weights have no gradient of their own, 4 instead of 6."""
        each = FLOPS_PER_WEIGHT if self.trains_all else FLOPS_PER_FROZEN_WEIGHT
        beside = 0 if self.trains_all else FLOPS_PER_WEIGHT * self.num_trained_parameters
        return CostCoefficients(
            per_token=each * self.num_body_parameters + beside,
            per_square=FLOPS_PER_WEIGHT * self.num_layers * self.attention_width,
            per_trained=each * self.hidden_size * self.vocabulary,
        )

    @property
    def trains_all(self) -> bool:
        """Whether no weight is frozen."""
        return self.num_trained_parameters == self.num_parameters

    def state_bytes_per_rank(self, *, stage: int, world: int, weight_bytes: int) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on each rank, without activations.

        ZeRO shards the optimizer state from stage 1, gradients from stage 2, weights from stage 3
        (arXiv 1910.02054); gradients are accumulated in float32. Frozen weights have neither.
        """
        n = self.num_trained_parameters
        master = ADAM_STATE_BYTES if weight_bytes < 4 else ADAM_STATE_BYTES - 4
        held = self.num_parameters + (0 if self.trains_all else n)
        return {
            "weights": held * weight_bytes // (world if stage >= 3 else 1),
            "gradients": n * 4 // (world if stage >= 2 else 1),
            "optimizer": n * master // (world if stage >= 1 else 1),
        }


def measure_model(
    config: Any, adapter: AdapterSettings | None = None, *, num_classes: int | None = None
) -> ModelCost:
    """Count a model's parameters without making them.

    Args:
        config: a causal LM's transformers configuration.
        adapter: what is trained instead of all weights.
        num_classes: of a classifier in the vocabulary's place.
    """
    with torch.device("meta"):
        if num_classes is None:
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForSequenceClassification.from_config(config)
    output = model.get_output_embeddings()  # a classifier has none; its own few weights count as body
    outside = {
        id(p): p.numel()
        for p in (None if output is None else output.weight, model.get_input_embeddings().weight)
        if p is not None
    }
    total = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    values = text.to_dict()
    heads = text.num_attention_heads
    trained = total if adapter is None or adapter.kind == "none" else _adapter_parameters(model, adapter)
    return ModelCost(
        num_parameters=total,
        num_body_parameters=total - sum(outside.values()),
        hidden_size=text.hidden_size,
        vocabulary=num_classes or output.weight.shape[0],
        num_layers=text.num_hidden_layers,
        attention_width=heads * (values.get("head_dim") or text.hidden_size // heads),
        num_trained_parameters=trained,
    )


def _adapter_parameters(model: Any, adapter: AdapterSettings) -> int:
    """Trained parameters of an adapter on a model that lies on the meta device."""
    with torch.device("meta"):
        add_adapter(model, adapter, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
