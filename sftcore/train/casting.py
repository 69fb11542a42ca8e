"""Parameters that stay float32 in a model that DeepSpeed trains in bfloat16: weights of routers.

In: a model whose lists name them. Out: the same parameters, spared by DeepSpeed's cast.
Invariant: they have the dtype in training that transformers gives them in use, or training is refused.
Trade-off: one of DeepSpeed 0.19.8's inner names (`_cast_module_mixed_precision`) has to stay; it keeps
buffers that a model names in float32, but casts parameters. ZeRO-3 cuts all weights up in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from sftcore.errors import Problem, UserInputError
from sftcore.model.apart import compute_apart
from sftcore.model.kept import kept_parameters


def keep_float32(model: PreTrainedModel, *, autocasts: bool, stage: int) -> list[nn.Parameter]:
    """The parameters that DeepSpeed's cast has to leave alone.

    Where weights are float32 under autocast there is no cast: their modules then compute outside of it.

    Raises:
        UserInputError: there are some, and ZeRO-3 has them in bfloat16 already.
    """
    kept = kept_parameters(model)
    if autocasts:
        compute_apart(model)
        return []
    check_sharding(model, stage=stage)
    return list(kept.values())


def check_sharding(model: PreTrainedModel, *, stage: int) -> None:
    """Refuse ZeRO-3 for a bfloat16 model that keeps weights in float32; a skeleton will do.

    Raises:
        UserInputError: with one of these weights.
    """
    kept = kept_parameters(model)
    if stage == 3 and kept and model.dtype == torch.bfloat16:
        raise UserInputError(
            Problem(
                what=f"model type {model.config.model_type!r} keeps weights in float32, which ZeRO-3 can't",
                where="deepspeed",
                got=f"{len(kept)} of them, such as {next(iter(kept))}",
                remedy="set deepspeed: zero2 (or zero2-offload), or model.dtype: float32",
            )
        )


@contextmanager
def casting_all_but(kept: list[nn.Parameter]) -> Iterator[None]:
    """Keep these parameters as they are while DeepSpeed casts all others, in the block."""
    cast_all = deepspeed.DeepSpeedEngine._cast_module_mixed_precision

    def cast_others(*args: Any, **options: Any) -> None:
        before = [parameter.data for parameter in kept]
        cast_all(*args, **options)
        for parameter, data in zip(kept, before, strict=True):
            parameter.data = data

    deepspeed.DeepSpeedEngine._cast_module_mixed_precision = cast_others
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._cast_module_mixed_precision = cast_all
