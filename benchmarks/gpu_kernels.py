"""The card's matrix-product rate; attention backends; head and loss: correctness first, then time and memory.

Attention: forward and backward over packs of drawn document lengths, and over one long document, against
`sdpa_docs` in float32 on the same inputs, ||out - ref|| / ||ref|| of the output and of each gradient; TFLOP/s
count the pairs that a causal (or windowed) document really has, 2 products forward and 5 backward.
Head: hidden states of trained positions -> loss and both gradients; `ours` (chunked), `full logits`
(cross_entropy over all of them), `torch` (F.linear_cross_entropy, where it exists), `liger` (what
`model.head: liger` runs: a loss per position, float32 sums) and `liger mean` (its own mean, its own sums),
where it is installed; each with its error against the float32 loss of full logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.gpu_clock import Case, Target, seconds_of
from sftcore.model.attention import BACKENDS
from sftcore.model.attention.flex import NAME as FLEX
from sftcore.model.attention.needs import AttentionNeeds
from sftcore.model.attention.sdpa_docs import sdpa_docs_attention
from sftcore.model.loss import liger_cross_entropy, linear_cross_entropy

ATTENTION_TOLERANCE = 2e-2  # bfloat16 against float32, relative L2
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 2e-2  # likewise
DRAWN, ONE = "drawn lengths", "one document"
PACKS = (  # documents, tokens, head size, window: 64 cuts documents of drawn lengths, 512 the long one
    (DRAWN, 4096, 64, None),
    (DRAWN, 4096, 128, None),
    (DRAWN, 4096, 256, None),
    (DRAWN, 4096, 256, 64),
    (ONE, 16_384, 128, None),
    (ONE, 16_384, 256, 512),
)
FLEX_PACKS = (PACKS[3], PACKS[4])
Tensors = tuple[torch.Tensor, ...]


def limit_cases(target: Target) -> Iterator[Case]:
    """What dense bfloat16 products reach."""
    size = 256 if target.is_tiny else 8192
    yield Case(
        description={"section": "limit", "product": f"{size}^3 bfloat16"},
        run=lambda: {"teraflops_per_second": product_rate(target, size)},
        seconds=5,
    )


def product_rate(target: Target, size: int) -> float:
    """TFLOP/s of one square product."""
    a, b = (torch.randn(size, size, device=target.device, dtype=torch.bfloat16) for _ in "ab")
    return 2e-12 * size**3 / seconds_of(target, lambda: a @ b, repeats=10)


def attention_cases(target: Target) -> Iterator[Case]:
    """Every backend on PACKS; flex, which compiles anew for each, on two of them."""
    num_heads, num_groups = (4, 2) if target.is_tiny else (32, 8)
    for (packed, num_tokens, head_size, window), name in product(PACKS, BACKENDS):
        if name == FLEX and (packed, num_tokens, head_size, window) not in FLEX_PACKS:
            continue
        description = {
            "section": "attention",
            "backend": name,
            "packed": packed,
            "tokens": num_tokens // 32 if target.is_tiny else num_tokens,
            "heads": num_heads,
            "key_value_heads": num_groups,
            "head_size": head_size,
            "window": window,
        }
        yield Case(
            description=description,
            run=lambda d=description: measure_attention(target, d),
            seconds=20 if name == FLEX else 2,
        )


def measure_attention(target: Target, case: dict) -> dict:
    """Errors, TFLOP/s and peak bytes of one backend."""
    attention, lacks = BACKENDS[case["backend"]]
    size = case["head_size"]
    needs = AttentionNeeds(head_size=size, value_size=size, dtype="bfloat16", device=target.device.type)
    if lacks(needs):
        return {"state": "refused", "reason": "; ".join(lacks(needs))}
    is_one = case["packed"] == ONE
    lengths = (case["tokens"],) if is_one else target.documents(case["tokens"])
    torch.manual_seed(0)
    shape = (case["tokens"], case["head_size"])
    q, g = (torch.randn(1, case["heads"], *shape, device=target.device) for _ in "qg")
    k, v = (torch.randn(1, case["key_value_heads"], *shape, device=target.device) for _ in "kv")
    arguments = _document_arguments(lengths, target.device) | {
        "scaling": case["head_size"] ** -0.5,
        "sliding_window": case["window"],
    }
    reference = run_attention(sdpa_docs_attention, (q, k, v), g, arguments)
    low = tuple(t.bfloat16() for t in (q, k, v, g))
    found = run_attention(attention, low[:3], low[3], arguments)
    errors = {
        f"error_{name}": float((a.float() - b).norm() / b.norm())
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, reference, strict=True)
    }
    del reference, found
    target.reset_peak()
    seconds = seconds_of(target, lambda: run_attention(attention, low[:3], low[3], arguments))
    pairs = sum(_pairs(length, case["window"]) for length in lengths)
    return {
        "state": judge(all(error < ATTENTION_TOLERANCE for error in errors.values())),
        "documents": len(lengths),
        "longest": max(lengths),
        "seconds": seconds,
        "teraflops_per_second": 7 * 2e-12 * case["heads"] * case["head_size"] * pairs / seconds,
        **errors,
        "peak_bytes": target.peak_bytes(),
    }


def judge(is_right: bool) -> str:
    """A row's state. Ask of each error by itself: the largest of several may hide one that is NaN."""
    return "ok" if is_right else "wrong"


def _document_arguments(lengths: tuple[int, ...], device: torch.device) -> dict:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": lengths,
    }


def _pairs(length: int, window: int | None) -> int:
    """Query-key pairs of a causal document, within a window if given."""
    inside = min(length, window or length)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def run_attention(attention: Callable, inputs: Tensors, grad_1HTD: torch.Tensor, arguments: dict) -> Tensors:
    """Output (1, T, H, D) and gradients of q, k, v."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    module = torch.nn.Module()
    module.num_key_value_groups = leaves[0].shape[1] // leaves[1].shape[1]
    module.is_causal = True
    out, _ = attention(module, *leaves, None, **arguments)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_1HTD.transpose(1, 2))


def head_cases(target: Target) -> Iterator[Case]:
    """Every variant at three vocabularies and two shares of trained positions."""
    rows, width = (64, 32) if target.is_tiny else (8192, 2048)
    vocabularies = (128, 256) if target.is_tiny else (32_000, 128_256, 262_144)
    for vocabulary, share, name in product(vocabularies, (0.2, 1.0), HEADS):
        description = {
            "section": "head",
            "head": name,
            "tokens": rows,
            "trained_share": share,
            "width": width,
            "vocabulary": vocabulary,
        }
        yield Case(description=description, run=lambda d=description: measure_head(target, d), seconds=1.5)


def measure_head(target: Target, case: dict) -> dict:
    """Error of the loss and both gradients, seconds, peak bytes."""
    if case["head"] == "torch" and not hasattr(F, "linear_cross_entropy"):
        return {"state": "not run", "reason": f"needs torch >= 2.13, this is {torch.__version__}"}
    torch.manual_seed(0)
    count = int(case["tokens"] * case["trained_share"])
    options = {"device": target.device, "dtype": torch.bfloat16}
    hidden = torch.randn(count, case["width"], **options)
    weight = torch.randn(case["vocabulary"], case["width"], **options) * 0.02
    targets = torch.randint(case["vocabulary"], (count,), device=target.device)
    few = slice(0, min(count, 512))
    reference = head_gradients(_full_logits, hidden[few].float(), weight.float(), targets[few])
    head = HEADS[case["head"]]
    found = head_gradients(head, hidden[few], weight, targets[few])
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)]
    del reference, found
    target.reset_peak()
    seconds = seconds_of(target, lambda: head_gradients(head, hidden, weight, targets), repeats=3)
    return {
        "state": judge(errors[0] < LOSS_TOLERANCE and all(e < GRADIENT_TOLERANCE for e in errors[1:])),
        "seconds": seconds,
        "teraflops_per_second": 6e-12 * count * case["width"] * case["vocabulary"] / seconds,
        "error_loss": errors[0],
        "error_gradient_of_states": errors[1],
        "error_gradient_of_weight": errors[2],
        "peak_bytes": target.peak_bytes(),
    }


def head_gradients(
    head: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> Tensors:
    """Mean loss and its gradients by states and weight."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = head(*leaves, targets)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, targets=targets, weights=_equal_weights(targets))


def _liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return liger_cross_entropy(hidden, weight, targets=targets, weights=_equal_weights(targets))


def _equal_weights(targets: torch.Tensor) -> torch.Tensor:
    return torch.full((len(targets),), 1 / len(targets), device=targets.device)


def _full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def _torch(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.linear_cross_entropy(hidden, weight, targets)


def _liger_mean(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return loss(weight, hidden, targets)


HEADS = {
    "ours": _ours,
    "full logits": _full_logits,
    "torch": _torch,
    "liger": _liger,
    "liger mean": _liger_mean,
}
