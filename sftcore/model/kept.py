"""What of a model is not an ordinary weight: tensors kept in float32, and buffers that belong to its files.

In: a transformers model. Out: names.
Invariant: they follow transformers' own rule for a model held in bfloat16 (`_keep_in_fp32_modules_strict`:
patterns that may match anywhere in a name), so what is written has the dtype that it is loaded in again.
Trade-off: names alone decide, from the model's lists; a model without lists keeps nothing in float32.
"""

from __future__ import annotations

import re

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


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the model's files that are no parameters: correction biases of routers, layers' scalars."""
    held = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in held}
