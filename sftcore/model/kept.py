"""What of a model is not an ordinary weight: tensors kept in float32, and buffers that belong to its files.

In: a transformers model. Out: names.
Invariant: they follow transformers' own rule for a model held in bfloat16 (`_keep_in_fp32_modules_strict`:
patterns that may match anywhere in a name), so what is written has the dtype that it is loaded in again.
Trade-off: names alone decide, from the model's lists; a model without lists keeps nothing in float32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def kept_pattern(model: PreTrainedModel) -> re.Pattern[str] | None:
    """What the name of a tensor holds that stays float32 in a bfloat16 model; None: there is none."""
    names = sorted(model._keep_in_fp32_modules_strict or ())
    return re.compile("|".join(name.replace("*", ".*") for name in names)) if names else None


def kept_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that stay float32 in a bfloat16 model, by name."""
    pattern = kept_pattern(model)
    return {n: p for n, p in model.named_parameters() if pattern is not None and pattern.search(n)}


def compute_apart(model: PreTrainedModel) -> None:
    """Let modules that have nothing but such parameters (routers) compute outside of autocast, in place.

    Their own code then decides, as it does in a model that is held in bfloat16.
    """
    kept = {id(parameter) for parameter in kept_parameters(model).values()}
    for module in model.modules():
        held = list(module.parameters())
        if held and all(id(parameter) in kept for parameter in held):
            module.forward = _without_autocast(module.forward)


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def apart(*args: Any, **options: Any) -> Any:
        device = next(a.device.type for a in (*args, *options.values()) if torch.is_tensor(a))
        with torch.autocast(device, enabled=False):
            return forward(*args, **options)

    return apart


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the model's files that are no parameters: correction biases of routers, layers' scalars."""
    held = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in held}
