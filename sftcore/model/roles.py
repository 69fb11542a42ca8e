"""What weights do: which a token meets, which are held in 4 bits, which Muon updates.

In: a model, on any device. Out: sums of parameters, or the parameters.
Invariant: what a plan predicts and what is done with weights go by the same functions.
Trade-off: experts are known by a part of their name, or by a first dimension as large as their number: true
of all of transformers' models with experts, and of a model's own code by its habit alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcore.model.forward import output_head

NUM_EXPERTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"})
CHOSEN = frozenset(  # experts that a token chooses
    {"num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"}
)
EXPERT_PARTS = frozenset({"experts", "routed_experts"})  # of names
Named = Iterable[tuple[str, torch.Tensor]]


def is_routed(config: Any) -> bool:
    """Whether a model has experts."""
    return _first(config, NUM_EXPERTS) > 0


def count_active(named: Named, config: Any) -> int:
    """Parameters that a token meets: of experts, the share that it chooses."""
    count = _first(config, NUM_EXPERTS)
    share = min(1.0, _first(config, CHOSEN) / count) if count else 1.0
    named = list(named)
    experts = sum(p.numel() for name, p in named if count and _is_expert(name, p, count))
    return sum(p.numel() for _, p in named) - round(experts * (1 - share))


def _is_expert(name: str, parameter: torch.Tensor, count: int) -> bool:
    is_stacked = parameter.ndim == 3 and parameter.shape[0] == count
    return is_stacked or not EXPERT_PARTS.isdisjoint(name.split("."))


def _first(config: Any, names: frozenset[str]) -> int:
    """The first of these keys with a number, at any depth of the text's configuration; 0 if there is none."""
    return next((value for value in _values(config.get_text_config().to_dict(), names)), 0)


def _values(values: dict[str, Any], names: frozenset[str]) -> Iterator[int]:
    for key, value in values.items():
        number = value[0] if isinstance(value, list) and value else value
        if key in names and isinstance(number, int) and number > 0:
            yield number
        elif isinstance(value, dict):
            yield from _values(value, names)


def count_quantised(model: PreTrainedModel) -> int:
    """Weights that bitsandbytes holds in 4 bits: of linear layers, but for the output and stacked experts."""
    head = output_head(model)
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and module is not head
        and not any(name.endswith(part) for part in kept)
    )


def hidden_matrices(model: PreTrainedModel) -> list[Any]:
    """Trainable weights of linear layers between embedding and output layer, which Muon updates."""
    decoder: Any = model.get_decoder()
    embedding = decoder.get_input_embeddings().weight
    return [
        module.weight
        for module in decoder.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and module.weight is not embedding
    ]
