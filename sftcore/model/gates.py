"""Gated MLPs that keep two tensors of their inner width for backward instead of four.

In: a model with MLPs of the form down(act(gate(x)) * up(x)). Out: the same model, these MLPs of subclasses of
their own classes.
Invariant: forward is the module's own, bit for bit; backward is the same derivative. A class is taken if a
small one of it computes that form, in both modes and dtypes and beyond any clamp; others (fused gate and up
products, experts, layers with a number) are left as they are.
Trade-off: backward computes the activation and the product again, two passes over the inner width. Autograd
by itself keeps them, too: of 602 kB a token that SmolLM2-135M keeps for backward, 184. A product that does
more than multiply (an adapter, gathering of shards, autocast) is called as a module and keeps its input: 92.

Source: the form is SwiGLU's (Shazeer 2020, arXiv 2002.05202). Shapes: ... any, D hidden, I inner width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sftcore.model.proof import BROKEN

Activation = Callable[[torch.Tensor], torch.Tensor]
PROBED_SIZES = {"hidden_size": 8, "intermediate_size": 16}  # of the small MLP that tells a class's form
PROBED_ROWS, PROBED_SCALES = 64, (1.0, 1e3)  # enough to show dropout and clamps
PRODUCTS, ACTIVATION = ("gate_proj", "up_proj", "down_proj"), "act_fn"


def slim_gates(model: PreTrainedModel) -> int:
    """Let the model's gated MLPs keep less; returns how many do from now on. Call it once for a model."""
    config = model.config.get_text_config()
    mlps = [m for m in model.modules() if all(hasattr(m, part) for part in (*PRODUCTS, ACTIVATION))]
    kinds = {type(m) for m in mlps if not isinstance(m, _KeepsTwo)}
    slim: dict[Any, Any] = {
        kind: type(kind.__name__, (_KeepsTwo, kind), {}) for kind in kinds if is_gated(kind, config)
    }
    changed = [m for m in mlps if type(m) in slim and _has_gate_only(m)]
    for mlp in changed:
        mlp.__class__ = slim[type(mlp)]
    return len(changed)


@torch.no_grad()
def is_gated(kind: Any, config: Any) -> bool:
    """Whether a small MLP of the class, with these options, computes down(act(gate(x)) * up(x))."""
    small = copy.deepcopy(config)
    vars(small).update(PROBED_SIZES)
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(PROBED_ROWS, PROBED_SIZES["hidden_size"], generator=generator)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            mlp = kind(small).float()
            variants = (mlp, copy.deepcopy(mlp).eval(), copy.deepcopy(mlp).bfloat16())
            return _has_gate_only(mlp) and all(
                _computes_form(variant, hidden_RD * scale) for variant in variants for scale in PROBED_SCALES
            )
    except (*BROKEN, RuntimeError):
        return False


def _computes_form(mlp: Any, hidden: torch.Tensor) -> bool:
    hidden = hidden.to(mlp.down_proj.weight.dtype)
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
    return torch.equal(mlp(hidden), expected)


def _has_gate_only(mlp: nn.Module) -> bool:
    """Whether an MLP has three products and an activation without parameters, and nothing else."""
    activation: Any = mlp.act_fn
    has_parameters = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return not has_parameters and {name for name, _ in mlp.named_children()} <= {*PRODUCTS, ACTIVATION}


class _KeepsTwo:
    """Before an MLP's class: its own forward, but for what autograd keeps of it."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            own: torch.Tensor = super().forward(hidden)  # type: ignore[misc]
            return own
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        if _is_plain(self.down_proj) and gate.dtype == up.dtype == self.down_proj.weight.dtype:  # no autocast
            return _GatedDown.apply(gate, up, self.down_proj.weight, self.act_fn)
        return self.down_proj(_Gated.apply(gate, up, self.act_fn))


def _is_plain(module: nn.Module) -> bool:
    """Whether a product with its weight is all that calling it does: no adapter, no gathering of shards."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) is nn.Linear and module.bias is None and not any(hooks)


def _gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the gate, of up, and the activated gate, from the gradient of activation(gate) * up."""
    compute = (
        activation.forward if isinstance(activation, nn.Module) else activation
    )  # hooks saw it in forward
    with torch.enable_grad():
        gate = gate.detach().requires_grad_()
        activated = compute(gate)
    [grad_gate] = torch.autograd.grad(activated, gate, grad * up)
    activated = activated.detach()
    return grad_gate, grad * activated, activated


class _Gated(torch.autograd.Function):
    """activation(gate) * up: three tensors are kept, with the input of what follows."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = _gradients(gate, up, grad, ctx.activation)
        return grad_gate, grad_up, None


class _GatedDown(torch.autograd.Function):
    """(activation(gate) * up) @ weight.T: two tensors are kept."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight_DI: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight_DI)
        ctx.activation = activation
        return F.linear(activation(gate) * up, weight_DI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight_DI = ctx.saved_tensors
        grad_gate, grad_up, activated = _gradients(gate, up, grad @ weight_DI, ctx.activation)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            product_TI = (activated * up).flatten(0, -2)
            grad_weight = grad.flatten(0, -2).T @ product_TI
        return grad_gate, grad_up, grad_weight, None
