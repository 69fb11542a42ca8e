"""Losses of samples: how well a model writes each sample of a store, as confidence and rankings need it.

In: an engine, the packs of a whole store. Out: mean cross-entropy and number of targets of each sample.
Invariant: a sample's loss is that of the sample alone, whatever shares its pack and however many ranks there
are; samples come in the order of the store.
Trade-off: every rank holds 16 bytes for each sample of the store, instead of the samples of its own packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sftcore import dist
from sftcore.batching.collate import Batch
from sftcore.train.batches import NUMBER, PackSource, all_batches
from sftcore.train.engine import Engine
from sftcore.train.outcome import StopAsked, never


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLosses:
    """Losses of the N samples of a store, in its order.

    Args:
        ids: of the samples.
        mean_losses: (N,) float64, mean cross-entropy of the sample's targets.
        num_trained: (N,) int64, its targets.
    """

    ids: list[str]
    mean_losses: NDArray[np.float64]
    num_trained: NDArray[np.int64]


def evaluate_samples(engine: Engine, source: PackSource, *, stop: StopAsked = never) -> SampleLosses:
    """The loss of each sample of `source` (see `whole_set`), the same on every rank; all ranks call it.

    Raises:
        Abandoned: a rank was asked to stop.
    """
    total_2N = torch.zeros(2, len(source.store), dtype=torch.float64, device=engine.device)

    def add(batch: Batch) -> None:
        losses_K = engine.objective.losses(batch).double()
        if batch.num_tokens:  # else another rank counts these samples
            numbers_K = batch.extra[NUMBER][batch.target_documents]
            total_2N.index_add_(1, numbers_K, torch.stack([losses_K, torch.ones_like(losses_K)]))

    with engine.gathering():
        engine.visit(all_batches(source), add, stop=stop)
    sums, counts = dist.sum_over_ranks(total_2N).cpu().numpy()
    return SampleLosses(
        ids=list(source.store.ids), mean_losses=sums / counts, num_trained=counts.astype(np.int64)
    )
