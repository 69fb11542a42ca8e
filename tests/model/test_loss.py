"""The chunked head equals torch's full float32 cross-entropy, forward and backward."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sftcore.errors import MissingEnvironmentError
from sftcore.model import loss as loss_module
from sftcore.model.loss import TrainedTokenHead, choose_head, liger_cross_entropy, linear_cross_entropy

SETTINGS = [
    {},
    {"softcap": 3.0},
    {"z_loss": 0.1},
    {"label_smoothing": 0.2},
    {"softcap": 2.0, "z_loss": 0.01, "label_smoothing": 0.1},
]


def reference(hidden, weight, bias, targets, weights, softcap=None, z_loss=0.0, label_smoothing=0.0):
    logits = nn.functional.linear(hidden, weight, bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return ((losses + z_loss * torch.logsumexp(logits, -1) ** 2) * weights).sum()


def inputs(dtype, rows=7, size=5, vocabulary=11):
    torch.manual_seed(0)
    hidden = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, size, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,)), torch.rand(rows)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
def test_value_and_gradients_equal_the_full_softmax(options, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", rows_per_chunk * 11)
    hidden, weight, bias, targets, weights = inputs(torch.float32)
    expected = reference(hidden, weight, bias, targets, weights, **options)
    expected_grads = torch.autograd.grad(expected * 2, (hidden, weight, bias))
    found = linear_cross_entropy(hidden, weight, bias, targets=targets, weights=weights, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found * 2, (hidden, weight, bias)), expected_grads, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [3, 100])
def test_a_sum_takes_the_weights_gradient_in_autograds_place(columns, monkeypatch):
    monkeypatch.setattr(loss_module, "SUMMED_COLUMNS", columns)
    hidden, weight, bias, targets, weights = inputs(torch.float32)
    expected = torch.autograd.grad(reference(hidden, weight, bias, targets, weights), (hidden, weight, bias))
    total = torch.ones_like(weight)
    found = linear_cross_entropy(hidden, weight, bias, targets=targets, weights=weights, gradient_sum=total)
    found.backward()
    assert weight.grad is None
    for ours, theirs in zip((hidden.grad, total - 1, bias.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [2, 100])
def test_bfloat16_in_float32_loss_out(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", rows_per_chunk * 64)
    hidden, weight, _, targets, weights = inputs(torch.bfloat16, rows=33, size=16, vocabulary=64)
    found = linear_cross_entropy(hidden, weight, targets=targets, weights=weights)
    assert found.dtype == torch.float32
    expected = reference(hidden.float(), weight.float(), None, targets, weights)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)  # bf16 logits: 8 bits
    found_grad = torch.autograd.grad(found, weight)[0]
    expected_grad = torch.autograd.grad(expected, weight)[0]
    assert found_grad.dtype == torch.bfloat16
    torch.testing.assert_close(found_grad.float(), expected_grad.float(), rtol=5e-2, atol=2e-2)


def test_no_trained_position_gives_zero_loss_and_gradient():
    hidden = torch.empty(0, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, targets=torch.empty(0, dtype=torch.int64), weights=torch.empty(0)
    )
    loss.backward()
    assert loss.item() == 0 and weight.grad.abs().sum() == 0


def test_head_shares_the_weight_and_still_gives_logits():
    linear = nn.Linear(5, 11, bias=False)
    head = TrainedTokenHead.from_linear(linear, softcap=None)
    assert head.weight is linear.weight
    hidden = torch.randn(3, 5)
    torch.testing.assert_close(head(hidden), linear(hidden))
    targets = torch.tensor([1, 2, 3])
    found = head(hidden, targets, torch.full((3,), 1 / 3))
    torch.testing.assert_close(found, cross_entropy(linear(hidden), targets))


def test_under_autocast_the_products_are_bfloat16_and_gradients_float32():
    head = TrainedTokenHead.from_linear(nn.Linear(16, 32, bias=False), softcap=None)
    hidden = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(hidden, torch.arange(4), torch.full((4,), 0.25))
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    exact = cross_entropy(nn.functional.linear(hidden, head.weight), torch.arange(4))
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


class LigerStandIn(nn.Module):
    """liger-kernel 0.8.5's documented signature and mathematics, in plain torch, for reduction="none"."""

    def __init__(
        self,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
        use_token_scaling=False,
    ):
        super().__init__()
        assert reduction == "none" and accum_dtype == torch.float32
        self.options = {"softcap": softcap, "z_loss": lse_square_scale, "label_smoothing": label_smoothing}

    def forward(self, lin_weight, _input, target, bias=None):
        ones = torch.eye(len(target))
        return torch.stack([reference(_input, lin_weight, bias, target, one, **self.options) for one in ones])


@pytest.mark.parametrize("options", SETTINGS)
def test_liger_gets_weight_states_targets_and_every_option(options, monkeypatch):
    stand_in = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=LigerStandIn)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=stand_in))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    hidden, weight, bias, targets, weights = inputs(torch.float32)
    arguments = {"targets": targets, "weights": weights, **options}
    ours = linear_cross_entropy(hidden, weight, bias, **arguments)
    theirs = liger_cross_entropy(hidden, weight, bias, **arguments)
    torch.testing.assert_close(theirs, ours)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    nothing = liger_cross_entropy(hidden[:0], weight, targets=targets[:0], weights=weights[:0])
    assert nothing == 0 and not torch.autograd.grad(nothing, weight)[0].any()


def test_the_head_is_chosen_by_ability(monkeypatch):
    assert choose_head("auto", device="cpu") == "chunked"
    with pytest.raises(MissingEnvironmentError, match=r"(?s)needs a CUDA device.*sftcore\[gpu\]"):
        choose_head("liger", device="cpu")
    refusals = {"0.8.1": "has wrong gradients", "0.8.2": "", "0.10.0": "", None: "is not installed"}
    for version, refusal in refusals.items():
        monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name, v=version: v)
        monkeypatch.setattr(loss_module.metadata, "version", lambda name, v=version: v)
        assert choose_head("auto", device="cuda") == choose_head("chunked", device="cuda") == "chunked"
        if refusal:
            with pytest.raises(MissingEnvironmentError, match=refusal):
                choose_head("liger", device="cuda")
        else:
            assert choose_head("liger", device="cuda") == "liger"


def test_liger_without_metadata_is_refused(monkeypatch):
    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(MissingEnvironmentError, match="no metadata that tells its version"):
        choose_head("liger", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("options", SETTINGS)
def test_ligers_kernels_equal_ours(options):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    hidden = torch.randn(300, 128, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 128, device="cuda", requires_grad=True)
    targets, weights = torch.randint(1000, (300,), device="cuda"), torch.rand(300, device="cuda")
    arguments = {"targets": targets, "weights": weights, **options}
    ours = linear_cross_entropy(hidden, weight, **arguments)
    theirs = liger_cross_entropy(hidden, weight, **arguments)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()
