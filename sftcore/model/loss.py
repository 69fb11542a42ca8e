"""The head: hidden states of trained positions -> the step's loss, never holding all logits.

In: (K, D) hidden states of positions that have a target, the vocabulary projection, K targets and weights.
Out: the weighted sum of cross-entropies, float32.
Invariant: value and gradients equal those of the full float32 softmax; only the summing order differs.
Trade-off: logits are made in blocks of the vocabulary (`columns_per_block`) and made again in backward: one
more product of three with the vocabulary matrix, against K * V * 6 bytes (4.3 GB for 4,096 trained tokens and
262k entries).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from sftcore.errors import MissingEnvironmentError, Problem

log = logging.getLogger(__name__)
CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MB in float32
SUMMED_COLUMNS = 2**13  # of the gradient, whose product is made before it is added
LIGER_REMEDY = "install the extra (pip install 'sftcore[gpu]'), or set model.head: auto"
LIGER_VERSION = (0, 8, 2)  # before, gradients of reduction="none" were wrong


class TrainedTokenHead(nn.Linear):
    """The vocabulary projection; given targets, it returns the loss instead of logits.

    It stays an `nn.Linear` under its old name, so tied embeddings, saved files and ZeRO-3's gathering of
    weights around a module's forward work as before.
    """

    softcap: float | None
    z_loss: float
    label_smoothing: float
    cross_entropy: Callable[..., torch.Tensor]
    weight_behind_lookup: torch.Tensor | None  # the same values, from a tied embedding's forward: see `tied`
    gradient_sum: torch.Tensor | None  # (V, D) float32: takes the weight's gradient in autograd's place

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        softcap: float | None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        kind: str = "chunked",
    ) -> TrainedTokenHead:
        """Take over weight and bias (the same Parameters, so ties hold).

        Args:
            kind: chunked (`linear_cross_entropy`) or liger (`liger_cross_entropy`).
        """
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight = linear.weight
        head.bias = linear.bias
        head.weight_behind_lookup = head.gradient_sum = None
        head.softcap, head.z_loss, head.label_smoothing = softcap, z_loss, label_smoothing
        head.cross_entropy = liger_cross_entropy if kind == "liger" else linear_cross_entropy
        return head

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (..., V) without targets; with (K,) targets and weights, the loss of (K, D) states.

        In eval mode that is the cross-entropy alone, so that losses of runs can be compared. Without weights,
        it is the (K,) cross-entropies, and has no gradient.
        """
        if targets is None:
            return super().forward(hidden)
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        looked_up, self.weight_behind_lookup = self.weight_behind_lookup, None
        weight = (self.weight if looked_up is None else looked_up).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if weights is None:
            with torch.no_grad():
                return _losses(hidden.to(dtype), weight, bias, targets, (self.softcap, 0.0, 0.0))[0]
        return self.cross_entropy(
            hidden.to(dtype),
            weight,
            bias,
            targets=targets,
            weights=weights,
            softcap=self.softcap,
            z_loss=self.z_loss if self.training else 0.0,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            gradient_sum=self.gradient_sum,
        )


def choose_head(wanted: str, *, device: str) -> str:
    """Which loss a model trains with: liger or chunked.

    auto is chunked until both are measured on a card (benchmarks.gpu head). liger adds each of its small
    chunks' (V, D) product to a float32 sum: for 2,458 trained positions of a 1B model that traffic comes to
    33 ms by arithmetic, the products themselves to 5 ms.

    Args:
        wanted: auto, or one of them.
        device: "cuda" or "cpu".

    Raises:
        MissingEnvironmentError: liger is asked for and can't be had.
    """
    kind = "chunked" if wanted == "auto" else wanted
    reason = "it needs a CUDA device" if device != "cuda" else _why_no_liger()
    if kind == "liger" and reason:
        raise MissingEnvironmentError(
            Problem(what=f"liger's loss can't be used: {reason}", where="model.head", remedy=LIGER_REMEDY)
        )
    log.info("head: %s", kind)
    return kind


def _why_no_liger() -> str:
    """Empty if it is there."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        found = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return "liger_kernel has no metadata that tells its version"
    numbers = tuple(int(n) for n in found.split(".")[:3] if n.isdigit())
    return "" if numbers >= LIGER_VERSION else f"liger-kernel {found} has wrong gradients"


def liger_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    gradient_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` by liger-kernel's Triton kernels; arguments and value are the same.

    Losses come per position, so that each has its own weight; like ours, liger then makes each chunk's logits
    again in backward. The weight's gradient is summed in float32, and goes through autograd.
    """
    del gradient_sum
    if not len(targets):
        return (hidden.sum() + weight.sum()).float() * 0.0  # its kernels take no empty batch
    liger = importlib.import_module("liger_kernel.transformers")
    losses_K = liger.LigerFusedLinearCrossEntropyLoss(
        lse_square_scale=z_loss,
        label_smoothing=label_smoothing,
        reduction="none",
        softcap=softcap,
        accum_dtype=torch.float32,
    )(weight, hidden, targets, bias)
    return (losses_K.float() * weights).sum()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    gradient_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_k weights[k] * (CE_k + z_loss * lse_k^2), with CE against the label-smoothed target.

    CE_k = lse_k - (1 - s) * logit[target_k] - s * mean_v(logit_v), as in torch.nn.functional.cross_entropy;
    the z-loss is PaLM's (arXiv 2204.02311, section 5).

    Args:
        hidden: (K, D), float32 or bfloat16.
        weight: (V, D).
        bias: (V,) or None.
        targets: (K,) int64.
        weights: (K,) float32.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        gradient_sum: (V, D) float32; backward adds the weight's gradient to it and hands autograd none.

    Returns:
        scalar, float32.
    """
    settings = (softcap, z_loss, label_smoothing)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, settings, gradient_sum)


class _LinearCrossEntropy(torch.autograd.Function):
    """In blocks of the vocabulary; backward makes each block's logits again from the saved hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        settings: tuple[float | None, float, float],
        gradient_sum: torch.Tensor | None,
    ) -> torch.Tensor:
        losses, lse = _losses(hidden, weight, bias, targets, settings)
        ctx.save_for_backward(hidden, weight, bias, targets, weights, lse)
        ctx.settings, ctx.gradient_sum = settings, gradient_sum
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, weights, lse = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        is_summed = need_weight and ctx.gradient_sum is not None
        grad_weight = torch.empty_like(weight) if need_weight and not is_summed else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        scale = (weights * grad_output)[:, None]
        for block in _blocks(hidden, weight):
            part = _of(block, weight, bias)
            grad = _grad_logits(hidden, *part, _columns(targets, block), lse, ctx.settings, len(weight))
            grad *= scale
            if grad_bias is not None:
                grad_bias[block] = grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden += grad @ part[0]
            if grad_weight is not None:
                torch.mm(grad.T, hidden, out=grad_weight[block])
            if is_summed:
                _add_products(ctx.gradient_sum[block], grad, hidden)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    settings: tuple[float | None, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) losses of positions, and the log of the sum of their exponentials, float32."""
    softcap, z_loss, smoothing = settings
    lse = torch.full(targets.shape, -torch.inf, device=hidden.device)
    picked, sums = torch.zeros_like(lse), torch.zeros_like(lse)
    for block in _blocks(hidden, weight):
        logits = _logits(hidden, *_of(block, weight, bias), softcap)
        lse = torch.logaddexp(lse, torch.logsumexp(logits, -1))
        column, is_here = _columns(targets, block)
        picked += logits.gather(-1, column).squeeze(-1) * is_here
        if smoothing:
            sums += logits.sum(-1)
    return lse - (1 - smoothing) * picked - smoothing * sums / len(weight) + z_loss * lse**2, lse


def _add_products(total_CD: torch.Tensor, grad_KC: torch.Tensor, hidden_KD: torch.Tensor) -> None:
    """total += grad.T @ hidden, in blocks of columns, so that their products are small next to the total."""
    for start in range(0, len(total_CD), SUMMED_COLUMNS):
        columns = slice(start, start + SUMMED_COLUMNS)
        total_CD[columns] += grad_KC[:, columns].T @ hidden_KD


def columns_per_block(num_rows: int, hidden_size: int) -> int:
    """Entries of the vocabulary whose logits are made at a time for all positions.

    A block of the weight's gradient is whole at once, so that no float32 sum of (V, D) is kept: 670 MB with
    262k entries of 640. The (K, D) sum of the hidden states' gradient takes twice a smallest block.
    """
    return max(CHUNK_ELEMENTS // max(1, num_rows), hidden_size // 2, 1)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size, step = len(weight), columns_per_block(*hidden.shape)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _of(
    block: slice, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight[block], None if bias is None else bias[block]


def _columns(targets: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, 1) column of each target in the block, any where it is in another; (K,) 1.0 where it is here."""
    is_here = (targets >= block.start) & (targets < block.stop)
    return torch.where(is_here, targets - block.start, 0)[:, None], is_here.float()


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """(rows, V) float32."""
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _grad_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    columns: tuple[torch.Tensor, torch.Tensor],
    lse: torch.Tensor,
    settings: tuple[float | None, float, float],
    vocabulary: int,
) -> torch.Tensor:
    """(K, columns) float32, gradient of the positions' losses by a block's (uncapped) logits."""
    softcap, z_loss, smoothing = settings
    logits = _logits(hidden, weight, bias, softcap)
    cap_slope = None if softcap is None else 1 - (logits / softcap) ** 2
    grad = logits.sub_(lse[:, None]).exp_()
    if z_loss:
        grad *= 1 + 2 * z_loss * lse[:, None]
    if smoothing:
        grad -= smoothing / vocabulary
    column, is_here = columns
    grad.scatter_add_(-1, column, (smoothing - 1) * is_here[:, None])
    return grad if cap_slope is None else grad * cap_slope
