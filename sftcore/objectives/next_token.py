"""Next token: a causal LM learns the trained tokens of its packs.

In: a `Batch` whose targets are token ids. Out: the pack's share of the step's cross-entropy.
Invariant: hidden states of all positions come from the decoder; only trained ones meet the head.
Trade-off: logits are made twice (see `model.loss`), so that they are never all there.
"""

from __future__ import annotations

from typing import Any, Self

import torch

from sftcore.batching.collate import Batch
from sftcore.config import Recipe
from sftcore.model.forward import decode_states, output_head
from sftcore.model.load import load_for_training
from sftcore.objectives.objective import Metrics, Objective


class NextToken(Objective):
    """Weighted cross-entropy of the batch's targets."""

    @classmethod
    def load(cls, recipe: Recipe, *, sharded_by: dict[str, Any] | None = None) -> Self:
        """As `Objective.load`."""
        return cls(load_for_training(recipe, kind=cls.auto_class, sharded_by=sharded_by))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """The pack's share of the loss."""
        return output_head(self.causal_lm)(self.states(batch), batch.targets, batch.weights), {}

    def losses(self, batch: Batch) -> torch.Tensor:
        """As `Objective.losses`."""
        losses_K: torch.Tensor = output_head(self.causal_lm)(self.states(batch), batch.targets)
        return losses_K

    def states(self, batch: Batch) -> torch.Tensor:
        """(K, D) what goes into the output layer for each of the targets."""
        return decode_states(self.causal_lm, batch)[0].index_select(0, batch.trained_index)
