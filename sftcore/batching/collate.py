"""Collate: the samples of a pack -> one (1, T) batch whose documents can't see each other.

In: samples (input_ids, labels already shifted). Out: `Batch` of tensors on the CPU.
Invariant: positions restart at each document; a label is only ever a target inside its own document, since
the shift happened per sample; weights of all batches of a step sum to 1, so partial losses add up to the
step's loss.
Trade-off: documents are laid end to end without pads, so shapes change from pack to pack.

    input_ids     [a0 a1 a2 | b0 b1]
    position_ids  [ 0  1  2 |  0  1]
    cu_seqlens    [0, 3, 5]    max_seqlen 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from sftcore.data.seam import UNTRAINED as UNTRAINED

if TYPE_CHECKING:
    from sftcore.data.prompts import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One pack, ready for the model.

    Args:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, restarting at each document.
        cu_seqlens: (num_documents + 1,) int32, where documents begin and end.
        max_seqlen: longest document in tokens, a Python int (no device sync).
        document_lengths: the same as Python ints, for host-side planning.
        trained_index: (K,) int64, positions with a target.
        targets: (K,) int64, token ids.
        weights: (K,) float32, share of each position in the step's loss.
        num_tokens: T; 0 in a pack without work, whose weights are 0.
        extra: further columns by name, a row (or several) for each document, in their order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    document_lengths: tuple[int, ...]
    trained_index: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    num_tokens: int
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def target_documents(self) -> torch.Tensor:
        """(K,) number of the document that each target stands in."""
        return torch.searchsorted(self.cu_seqlens, self.trained_index.int(), right=True) - 1

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies to a GPU, from page-locked memory, don't block the host."""
        return replace(
            self,
            input_ids=_send(self.input_ids, device),
            position_ids=_send(self.position_ids, device),
            cu_seqlens=_send(self.cu_seqlens, device),
            trained_index=_send(self.trained_index, device),
            targets=_send(self.targets, device),
            weights=_send(self.weights, device),
            extra={name: _send(column, device) for name, column in self.extra.items()},
        )


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from pageable memory, the copy waits for all work before it
    return tensor.to(device, non_blocking=True)


def collate(
    samples: Sequence[Sample],
    *,
    normalise: Literal["token", "sample"],
    num_trained_in_step: int,
    num_samples_in_step: int,
    idle: bool = False,
) -> Batch:
    """Lay samples end to end; their extra columns, of which all have the same, one after another.

    Weights: `token`: 1 / (trained tokens of the step). `sample`: 1 / (samples of the step * trained tokens of
    the sample), the mean over samples of their mean cross-entropy.

    Args:
        idle: give every position weight 0 (the rank has no work but must join the collectives).
    """
    lengths = [len(s.input_ids) for s in samples]
    labels = np.concatenate([s.labels for s in samples])
    trained = np.flatnonzero(labels != UNTRAINED)
    weights = _weights(samples, normalise, num_trained_in_step, num_samples_in_step)
    input_ids = np.concatenate([s.input_ids for s in samples])
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64))[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
        document_lengths=tuple(lengths),
        trained_index=torch.from_numpy(trained),
        targets=torch.from_numpy(labels[trained].astype(np.int64)),
        weights=torch.from_numpy(weights * (0.0 if idle else 1.0)).float(),
        num_tokens=0 if idle else sum(lengths),
        extra={
            name: torch.from_numpy(np.concatenate([s.extra[name] for s in samples]))
            for name in samples[0].extra
        },
    )


def _weights(
    samples: Sequence[Sample], normalise: str, num_trained_in_step: int, num_samples_in_step: int
) -> np.ndarray:
    """(K,) float64, one weight per trained position, in order."""
    counts = np.array([int(np.count_nonzero(np.asarray(s.labels) != UNTRAINED)) for s in samples])
    if normalise == "token":
        return np.full(int(counts.sum()), 1.0 / num_trained_in_step)
    return np.repeat(1.0 / (num_samples_in_step * counts), counts)
