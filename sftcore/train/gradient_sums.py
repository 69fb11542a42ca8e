"""ZeRO-1's float32 sums of bfloat16 gradients: what is added to them is not copied first.

In: DeepSpeed's optimizer for bfloat16 at stage 1, the trained-token head. Out: the same optimizer, whose sums
the head and the weights' gradients are added to where they are made.
Invariant: a sum gets what DeepSpeed 0.19.8 would add, product by product; other optimizers are left alone.
Trade-off: two of DeepSpeed's inner names (`_update_hp_grad`, `fp32_groups_gradients`) have to stay. Of an
embedding of 262,144 x 640 its float32 copy was 671 MB and its gradient in bfloat16 335 MB, both at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sftcore.model.loss import TrainedTokenHead

CAST_ELEMENTS = 2**22  # of a gradient at a time, on CPUs: torch converts a whole operand there before it adds


def add_without_copies(optimizer: Any) -> bool:
    """Add each weight's gradient to its float32 sum as it is; False, changing nothing, at other stages."""
    if not hasattr(optimizer, "_update_hp_grad") or optimizer.autoep_folding_tp_group is not None:
        return False

    @torch.no_grad()
    def add(weight: Any, group: int, place: int, clear_lp_grads: bool) -> None:
        if weight.grad is None:
            return
        weight._hp_grad = optimizer.fp32_groups_gradients[group][place]
        flat = weight._hp_grad.view(-1), weight.grad.reshape(-1)
        size = len(flat[0]) if weight.is_cuda else CAST_ELEMENTS
        for total, part in zip(*(t.split(size) for t in flat), strict=True):
            total.add_(part)
        optimizer.fp32_groups_has_gradients[group][place] = True
        if clear_lp_grads:
            weight.grad.zero_()

    optimizer._update_hp_grad = add
    return True


def sum_head_in_place(optimizer: Any, head: nn.Module) -> Callable[[], None]:
    """Let backward add the head's gradient, and a tied embedding's, to the weight's float32 sum.

    Returns:
        to be called after each backward: it tells the optimizer that the weight has a gradient.
    """
    places = {id(w): (n, i) for n, group in enumerate(optimizer.bf16_groups) for i, w in enumerate(group)}
    if not isinstance(head, TrainedTokenHead) or id(head.weight) not in places:
        return lambda: None
    group, place = places[id(head.weight)]
    head.gradient_sum = optimizer.fp32_groups_gradients[group][place].view(head.weight.shape)

    def has_gradient() -> None:
        optimizer.fp32_groups_has_gradients[group][place] = True

    return has_gradient
