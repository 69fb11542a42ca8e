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
from transformers import AutoModelForCausalLM

from sftcore.batching.schedule import CostCoefficients

FLOPS_PER_WEIGHT = 6  # 2 forward, 4 backward
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
    """

    num_parameters: int
    num_body_parameters: int
    hidden_size: int
    vocabulary: int
    num_layers: int
    attention_width: int

    @property
    def coefficients(self) -> CostCoefficients:
        """For balancing packs, in FLOPs."""
        return CostCoefficients(
            per_token=FLOPS_PER_WEIGHT * self.num_body_parameters,
            per_square=FLOPS_PER_WEIGHT * self.num_layers * self.attention_width,
            per_trained=FLOPS_PER_WEIGHT * self.hidden_size * self.vocabulary,
        )

    def state_bytes_per_rank(self, *, stage: int, world: int, weight_bytes: int) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on each rank, without activations.

        ZeRO shards the optimizer state from stage 1, gradients from stage 2, weights from stage 3
        (arXiv 1910.02054); gradients are accumulated in float32.
        """
        n = self.num_parameters
        master = ADAM_STATE_BYTES if weight_bytes < 4 else ADAM_STATE_BYTES - 4
        return {
            "weights": n * weight_bytes // (world if stage >= 3 else 1),
            "gradients": n * 4 // (world if stage >= 2 else 1),
            "optimizer": n * master // (world if stage >= 1 else 1),
        }


def measure_model(config: Any) -> ModelCost:
    """Count a model's parameters without making them.

    Args:
        config: a causal LM's transformers configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    outside = {id(p): p.numel() for p in (output.weight, model.get_input_embeddings().weight)}
    total = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    values = text.to_dict()
    heads = text.num_attention_heads
    return ModelCost(
        num_parameters=total,
        num_body_parameters=total - sum(outside.values()),
        hidden_size=text.hidden_size,
        vocabulary=output.weight.shape[0],
        num_layers=text.num_hidden_layers,
        attention_width=heads * (values.get("head_dim") or text.hidden_size // heads),
    )
