"""The chunked head equals torch's full float32 cross-entropy, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sftcore.model import loss as loss_module
from sftcore.model.loss import TrainedTokenHead, linear_cross_entropy

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
