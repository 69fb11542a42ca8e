"""Optimizers: a model's trainable parameters -> groups with their decay and learning rate, and their updates.

In: an objective (under ZeRO-3 perhaps already sharded), the recipe's train section. Out: a torch optimizer.
Invariant: weight decay falls on matrices and never on vectors (norms, biases), however they are sharded; one
`train.lr` means the same size of update for AdamW and Muon.
Trade-off: Muon keeps 4 bytes of momentum a weight instead of AdamW's 8, and pays for it with about ten
products of each matrix with itself in every update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sftcore.config import TrainSettings
from sftcore.errors import Problem, UserInputError
from sftcore.model.quantise import require_bitsandbytes
from sftcore.model.roles import hidden_matrices

MUON_MOMENTUM = 0.95
# bitsandbytes counts a tensor's elements in 32 bits with a sign; DeepSpeed makes a group one tensor and pads
# it to a multiple of a few elements a rank
MAX_EIGHT_BIT_ELEMENTS = 2**31 - 2**16
LR_SCALE = "lr_scale"  # key of a parameter group: its learning rate is the step's times this
Group = dict[str, Any]


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (torch, fused), bitsandbytes' with 8-bit moments, or DeepSpeed's Muon.

    Raises:
        MissingEnvironmentError: bitsandbytes is not installed.
        UserInputError: a weight is too large for 8-bit moments.
    """
    if settings.optimizer == "muon":
        return _make_muon(model, settings)
    groups = _decay_groups((p for p in model.parameters() if p.requires_grad), settings)
    options: Group = {"lr": settings.peak_lr, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "adamw-8bit":
        bitsandbytes = require_bitsandbytes("train.optimizer: adamw-8bit")
        _refuse_larger(model, MAX_EIGHT_BIT_ELEMENTS)
        groups = [part for group in groups for part in _parts_of(group, MAX_EIGHT_BIT_ELEMENTS)]
        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **options)
        return eight_bit
    return torch.optim.AdamW(groups, fused=True, **options)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape before ZeRO-3 cut it up (a sharded parameter is an empty vector)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_learning_rate(groups: Iterable[Group], lr: float) -> None:
    """Give every group the step's learning rate, in its own scale."""
    for group in groups:
        group["lr"] = lr * group.get(LR_SCALE, 1.0)


def _decay_groups(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> list[Group]:
    """Matrices with weight decay, vectors without; those that stay float32 in a bfloat16 model apart."""
    parameters = list(parameters)
    dtypes = list(dict.fromkeys(p.dtype for p in parameters)) or [torch.float32]
    groups = []
    for dtype in dtypes:
        alike = [p for p in parameters if p.dtype == dtype]
        matrices = [p for p in alike if len(whole_shape(p)) > 1]
        vectors = [p for p in alike if len(whole_shape(p)) <= 1]
        groups += [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return groups[:2] + [group for group in groups[2:] if group["params"]]


def _refuse_larger(model: nn.Module, limit: int) -> None:
    """No weight can be in two groups."""
    sizes = {name: math.prod(whole_shape(p)) for name, p in model.named_parameters() if p.requires_grad}
    problems = [
        Problem(
            what=f"8-bit moments can't be kept for {name}: it is too large for bitsandbytes",
            where="train.optimizer",
            got=f"adamw-8bit, {size:,} elements",
            allowed=f"at most {limit:,}",
            remedy="set train.optimizer: adamw (deepspeed: zero2-offload if memory is short)",
        )
        for name, size in sizes.items()
        if size > limit
    ]
    if problems:
        raise UserInputError(*problems)


def _parts_of(group: Group, limit: int) -> Iterator[Group]:
    """The group cut, in order, into groups of at most `limit` elements; at least one, be it empty."""
    part: list[nn.Parameter] = []
    size = 0
    for parameter in group["params"]:
        num_elements = math.prod(whole_shape(parameter))
        if part and size + num_elements > limit:
            yield {**group, "params": part}
            part, size = [], 0
        part.append(parameter)
        size += num_elements
    yield {**group, "params": part}


def _make_muon(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Muon for the weights of the layers' linear maps, AdamW for embeddings, output layer, norms and biases.

    Muon's update of a (out, in) matrix is orthogonal, times sqrt(max(1, out / in)). It gets the learning rate
    0.2 sqrt(in) lr, with which its entries are as large as AdamW's (arXiv 2502.16982, section 2.2): hence
    a group for each number of inputs.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    causal_lm: Any = model.get_submodule("causal_lm")
    matrices = hidden_matrices(causal_lm)
    if all(p.device.type == "cpu" for p in matrices):
        # DeepSpeed compiles Muon's products; torch 2.13's code for CPUs gives NaN on AVX2 (where a matrix has
        # no more rows than columns), writes past its memory on AVX-512, and takes a minute to be made
        torch.compiler.set_stance("force_eager")
    chosen = {id(p) for p in matrices}
    for parameter in model.parameters():
        parameter.use_muon = id(parameter) in chosen  # type: ignore[attr-defined]  # DeepSpeed looks there
    groups: list[Group] = []
    for num_inputs in sorted({whole_shape(p)[1] for p in matrices}):
        scale = 0.2 * num_inputs**0.5
        groups.append(
            {
                "params": [p for p in matrices if whole_shape(p)[1] == num_inputs],
                "weight_decay": settings.weight_decay / scale,  # of the step's own rate, as AdamW's
                "momentum": MUON_MOMENTUM,
                "lr": settings.peak_lr * scale,
                LR_SCALE: scale,
                "use_muon": True,
            }
        )
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for group in _decay_groups(others, settings):
        adam = {"lr": settings.peak_lr, "betas": settings.betas, "eps": settings.eps, "use_muon": False}
        groups += [group | adam] if group["params"] else []
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return optimizer
