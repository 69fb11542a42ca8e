"""Gated MLPs that keep less compute what they computed, forward to the bit and backward to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from sftcore.config import AdapterSettings
from sftcore.model.adapters import add_adapter
from sftcore.model.gates import is_gated, slim_gates

KINDS = {"llama": LlamaMLP, "qwen3": Qwen3MLP, "gemma3": Gemma3MLP}
TOKENS = 50
PARTS = ("gate_proj", "up_proj", "down_proj")


def two(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The first MLP of a tiny model, as it comes and as one that keeps less."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).to(dtype)
    plain = copy.deepcopy(model.model.layers[0].mlp)
    assert slim_gates(model) == model.config.num_hidden_layers
    return plain, model.model.layers[0].mlp


def hidden_of(mlp: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    weight = mlp.gate_proj.weight
    return torch.randn(1, TOKENS, weight.shape[1]).mul_(3).to(weight.dtype).requires_grad_()


def results(mlp: nn.Module) -> list[torch.Tensor]:
    hidden = hidden_of(mlp)
    out = mlp(hidden)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), hidden.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]


def kept_widths(mlp: nn.Module) -> list[int]:
    """Last sizes of what autograd keeps of a forward, beside weights."""
    kept = {}
    weights = {p.data_ptr() for p in mlp.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor
        return tensor

    hidden = hidden_of(mlp)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mlp(hidden)
    assert out.requires_grad
    return sorted(tensor.shape[-1] for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("frozen", [(), ("down_proj",), PARTS])
def test_forward_is_the_modules_own_and_backward_the_same_derivative(name, dtype, tolerance, frozen):
    plain, slim = two(name, dtype)
    assert isinstance(slim, KINDS[name]) and type(slim).forward is not KINDS[name].forward
    for mlp in (plain, slim):
        for part in frozen:
            getattr(mlp, part).requires_grad_(False)
    expected, got = results(plain), results(slim)
    assert len(expected) == len(got) == 5 - len(frozen)
    assert torch.equal(expected[0], got[0])
    for one, other in zip(expected[1:], got[1:], strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= tolerance * one.float().norm()


@pytest.mark.parametrize("name", KINDS)
def test_the_input_and_two_tensors_of_the_inner_width_are_kept(name):
    plain, slim = two(name, torch.bfloat16)
    inner, hidden = slim.gate_proj.weight.shape
    assert kept_widths(plain).count(inner) >= 4
    assert kept_widths(slim) == sorted([hidden, inner, inner])


def test_biases_are_of_the_form_and_get_their_gradients():
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.mlp_bias = True
    model = AutoModelForCausalLM.from_config(config)
    plain = copy.deepcopy(model.model.layers[0].mlp)
    assert slim_gates(model)
    expected, got = results(plain), results(model.model.layers[0].mlp)
    assert len(got) == 2 + 6 and torch.equal(expected[0], got[0])
    for one, other in zip(expected[1:], got[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_product_with_hooks_or_an_adapter_is_called_and_keeps_its_input_too():
    plain, slim = two("llama", torch.float32)
    called = []
    for mlp in (plain, slim):
        mlp.down_proj.register_forward_hook(lambda *_: called.append("down"))
    for one, other in zip(results(plain), results(slim), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert called == ["down"] * 2
    assert kept_widths(slim).count(slim.gate_proj.weight.shape[0]) == 3


def test_with_an_adapter_everywhere_gradients_are_the_modules_own():
    gradients = []
    for slims in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        assert not slims or slim_gates(model)
        add_adapter(model, AdapterSettings(kind="lora", r=4), seed=0)
        for weight in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(weight, std=0.1)
        ids = torch.arange(12)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("down_proj" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_autocast_over_float32_weights():
    plain, slim = two("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [mlp(hidden_of(mlp)) for mlp in (plain, slim)]
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16 and torch.equal(*outs)
    for out in outs:
        out.float().square().sum().backward()
    for one, other in zip(plain.parameters(), slim.parameters(), strict=True):
        assert one.grad.dtype == other.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() <= 1e-2 * one.grad.norm()


def test_once_a_model_and_other_forms_never():
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert slim_gates(model) == model.config.num_hidden_layers
    assert slim_gates(model) == 0


class Doubled(LlamaMLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


class Clamped(LlamaMLP):
    """As DeepSeek-V4's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden).clamp(-10, 10)
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * up)


class Upcast(LlamaMLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(hidden).float()) * self.up_proj(hidden).float()
        return self.down_proj(gated.to(hidden.dtype))


class Dropped(LlamaMLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        return self.down_proj(nn.functional.dropout(gated, 0.01, self.training))


class Learned(LlamaMLP):
    """As with the activations prelu and xielu."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.act_fn = nn.PReLU()


@pytest.mark.parametrize("kind", [Doubled, Clamped, Upcast, Dropped, Learned])
def test_another_form_is_left_alone(kind):
    config = tiny_config("llama")
    assert is_gated(LlamaMLP, config) and not is_gated(kind, config)


def test_looking_at_a_class_draws_nothing():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    is_gated(LlamaMLP, tiny_config("llama"))
    assert torch.rand(1) == expected


def test_nothing_is_recorded_where_no_gradient_is_asked_for():
    slim = two("llama", torch.float32)[1]
    with torch.no_grad():
        assert slim(hidden_of(slim)).grad_fn is None
