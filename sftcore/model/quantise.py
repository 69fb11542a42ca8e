"""Quantisation through bitsandbytes, which no other module needs: 4-bit weights, 8-bit optimizer states.

In: a compute dtype, a module, weights. Out: transformers' quantisation settings; weights as 4 bits see them.
Invariant: what training multiplies with and what a merge dequantises come from the same nf4 blocks of 64
with doubly quantised scales (QLoRA, arXiv 2305.14314).
Trade-off: about 4.13 bits a weight instead of 16, at an error that the adapter trains around; embeddings,
norms and the output layer stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sftcore.errors import MissingEnvironmentError, Problem

KIND, DOUBLE, BLOCK = "nf4", True, 64


def require_bitsandbytes(where: str) -> Any:
    """The bitsandbytes module.

    Raises:
        MissingEnvironmentError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingEnvironmentError(
            Problem(
                what="this needs bitsandbytes, which is not installed",
                where=where,
                remedy="pip install 'sftcore[quant]'",
            )
        )
    import bitsandbytes

    return bitsandbytes


def quantisation_settings(dtype: torch.dtype) -> Any:
    """What transformers' `quantization_config` takes: nf4, double quantisation, products in `dtype`."""
    require_bitsandbytes("adapter.kind: qlora")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=KIND,
        bnb_4bit_use_double_quant=DOUBLE,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable_layout(modules: Iterable[nn.Module]) -> None:
    """Leave 4-bit layers in training mode, in a model that is otherwise in evaluation mode.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a layer's weights at its first forward in
    evaluation mode, into a layout that has no backward (gradients would stop there in silence), rounds the
    scales to bfloat16, and fails for layers with fewer than 64 inputs.
    """
    for module in modules:
        if type(module).__name__ == "Linear4bit":
            module.train()


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) weight -> what a product with its 4-bit form sees, in the same dtype."""
    functional = require_bitsandbytes("adapter.kind: qlora").functional
    blocks, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=KIND, compress_statistics=DOUBLE
    )
    restored: torch.Tensor = functional.dequantize_4bit(blocks, state)
    return restored.to(weight.dtype)
