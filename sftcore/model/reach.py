"""What a text reaches of a model: weights that no gradient of a text ever comes to are not trained.

In: a model, or its configuration. Out: names of weights beyond reach (a vision tower, say); the same model
with them frozen.
Invariant: what is frozen had no gradient from a text in any layer of its kind in a miniature; all else is
trained. Optimizers would decay it and keep states for it.
Trade-off: a miniature's forward and backward (0.1 s, once for a configuration) tells it, where the
model's own would take its gradients' memory; where a miniature can't be built, nothing is frozen.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sftcore.amounts import counted
from sftcore.model.forward import output_head
from sftcore.model.miniature import BEYOND, BREAKS, build, shrink
from sftcore.model.proof import probe_ids

log = logging.getLogger(__name__)
_FOUND: dict[str, frozenset[str]] = {}  # by configuration and kind


def unreached(config: Any, kind: Any) -> frozenset[str]:
    """Patterns (see `pattern`) of the weights beyond reach.

    Args:
        kind: the Auto class.
    """
    key = f"{kind.__name__} {config.to_json_string(use_diff=False)}"
    if key not in _FOUND:
        _FOUND[key] = _find(config, kind)
    return _FOUND[key]


@torch.inference_mode(False)
@torch.enable_grad()
def _find(config: Any, kind: Any) -> frozenset[str]:
    try:
        model = build(shrink(config), kind, attn_implementation="eager").train()
        ids = probe_ids(model.config, BEYOND)[None]
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    except BREAKS as error:
        log.debug("nothing is known of what texts reach: %r", error)
        return frozenset()
    head = {id(p) for p in output_head(model).parameters()}
    reached = {pattern(n) for n, p in model.named_parameters() if p.grad is not None or id(p) in head}
    return frozenset(pattern(n) for n, p in model.named_parameters() if p.requires_grad) - reached


def pattern(name: str) -> str:
    """The name of a weight without the numbers of layers and experts.

    >>> pattern("model.layers.17.mlp.experts.3.up_proj.weight")
    'model.layers.N.mlp.experts.N.up_proj.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze what no text reaches, and say so."""
    patterns = unreached(model.config, _kind_of(model))
    frozen = {name: p for name, p in model.named_parameters() if pattern(name) in patterns}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    if frozen:
        parts = Counter(".".join(name.split(".")[:2]) for name in frozen)
        named = ", ".join(f"{part} ({count})" for part, count in parts.most_common())
        log.info("frozen, because no text reaches them: %s of %s", counted(len(frozen), "weight"), named)


def unreached_layers(model: PreTrainedModel) -> list[str]:
    """Names of linear layers beyond reach, which an adapter leaves out."""
    patterns = unreached(model.config, _kind_of(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern(f"{name}.weight") in patterns
    ]


def count_unreached(named: Iterable[tuple[str, torch.Tensor]], config: Any, kind: Any) -> int:
    """Parameters beyond reach among these, and those that the model itself does not train."""
    patterns = unreached(config, kind)
    return sum(p.numel() for name, p in named if not p.requires_grad or pattern(name) in patterns)


def _kind_of(model: PreTrainedModel) -> Any:
    is_classifier = model.get_output_embeddings() is None
    return AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
