"""Classify: a decoder learns one class per document, in packs.

In: a recipe with `matching.mode: discriminative`; a `Batch` whose targets are classes, one at each document's
last position. Out: the pack's share of the step's cross-entropy.
Invariant: a document's class depends on its own tokens alone, packed or not, and is read from the state of
its last token or from the mean of its tokens' states.
Trade-off: whole weights on every rank while they are read, under ZeRO-3 too: a classifier is new and small,
its decoder at most a few billion parameters in the studies at hand.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sftcore.batching.collate import Batch
from sftcore.config import Recipe
from sftcore.model.classifier import load_classifier_for_training, mean_states
from sftcore.model.forward import decode_states
from sftcore.objectives.next_token import NextToken
from sftcore.settings import NUM_CLASSES


class Classify(NextToken):
    """Weighted cross-entropy of documents' classes.

    Args (attributes):
        pooling: which state of a document is classified: last, or mean.
    """

    auto_class = AutoModelForSequenceClassification
    architecture = "classifier"
    num_outputs = NUM_CLASSES
    is_shardable = False

    def __init__(self, causal_lm: PreTrainedModel, pooling: str = "last") -> None:
        super().__init__(causal_lm)
        self.pooling = pooling

    @classmethod
    def load(cls, recipe: Recipe, *, sharded_by: dict[str, Any] | None = None) -> Self:
        """As `Objective.load`; the classifier is new."""
        return cls(load_classifier_for_training(recipe), recipe.matching.pooling)

    def states(self, batch: Batch) -> torch.Tensor:
        """(K, D) what is classified of each document."""
        if self.pooling == "mean":
            return mean_states(decode_states(self.causal_lm, batch)[0], batch)
        return super().states(batch)
