"""RMS norms that keep less compute what they computed, forward to the bit and backward to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sftcore.model.norms import slim_norms

SHAPE = (1, 50, 3, 24)  # tokens and heads


def two(kind: type[nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = kind(SHAPE[-1]).to(dtype)
    plain.weight.data.uniform_(0.5, 1.5)
    slim = copy.deepcopy(plain)
    assert slim_norms(slim) == 1
    return plain, slim


def results(norm: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(SHAPE).mul_(3).to(dtype).requires_grad_()
    out = norm(hidden)
    out.backward(torch.randn(SHAPE).to(dtype))
    grad_weight = [] if norm.weight.grad is None else [norm.weight.grad]
    return [out.detach(), hidden.grad, *grad_weight]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_forward_is_the_modules_own_and_backward_the_same_derivative(kind, dtype, tolerance, is_frozen):
    plain, slim = two(kind, dtype)
    for norm in (plain, slim):
        norm.weight.requires_grad_(not is_frozen)
    expected, got = results(plain, dtype), results(slim, dtype)
    assert len(expected) == len(got) == (2 if is_frozen else 3)
    assert torch.equal(expected[0], got[0])
    for one, other in zip(expected[1:], got[1:], strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= tolerance * one.float().norm()


def test_the_derivative_is_that_of_finite_differences():
    slim = two(LlamaRMSNorm, torch.float32)[1]
    hidden = torch.randn(2, SHAPE[-1], requires_grad=True)
    assert torch.autograd.gradcheck(slim, (hidden,), eps=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_only_the_input_is_kept(kind):
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    norm = two(kind, torch.bfloat16)[1]
    hidden = torch.randn(SHAPE).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(hidden)
    assert set(kept) == {hidden.data_ptr(), norm.weight.data_ptr()}


def test_autocast_over_float32_weights():
    plain, slim = two(LlamaRMSNorm, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = results(plain, torch.bfloat16), results(slim, torch.bfloat16)
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= 1e-2 * one.float().norm()


def test_every_norm_of_a_model_once_and_others_never():
    model = AutoModelForCausalLM.from_config(tiny_config("gemma3"))
    assert slim_norms(model) == 2 * 6 + 1  # of a layer: four, and one each for queries and keys
    assert slim_norms(model) == 0
    assert isinstance(model.model.norm, Gemma3RMSNorm)
    assert slim_norms(nn.Sequential(nn.LayerNorm(4), MambaRMSNormGated(4, 2))) == 0


def test_a_norm_that_computes_something_else_is_left_alone():
    class OffsetRMSNorm(LlamaRMSNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) + 1

    assert slim_norms(OffsetRMSNorm(8)) == 0


def test_nothing_is_recorded_where_no_gradient_is_asked_for():
    slim = two(LlamaRMSNorm, torch.float32)[1]
    with torch.no_grad():
        assert slim(torch.ones(2, SHAPE[-1])).grad_fn is None
