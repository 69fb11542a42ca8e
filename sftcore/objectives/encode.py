"""Encode: a bidirectional encoder (BERT and its kin) learns the classes of pairs, the baseline of matching.

In: a recipe with `matching.mode: encoder`; a `Batch` whose targets are classes. Out: the pack's share of the
step's cross-entropy.
Invariant: the loss is the weighted cross-entropy of the model's own logits, each row masked to its document.
Trade-off: a pack is unfolded into rows padded to its longest document, since encoders pool in ways of their
own and can't be proven padding-free as decoders are; 16 documents of 20 to 60 tokens cost about half as much
again.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sftcore.batching.collate import Batch
from sftcore.config import Recipe
from sftcore.model.encoder import load_encoder_for_training, padded_logits, separator_of
from sftcore.objectives.objective import Metrics, Objective
from sftcore.settings import NUM_CLASSES


class Encode(Objective):
    """Weighted cross-entropy of an encoder's classifier.

    Args (attributes):
        separator_id: of the token between two texts.
    """

    auto_class = AutoModelForSequenceClassification
    num_outputs = NUM_CLASSES
    architecture = "encoder"
    is_shardable = False

    def __init__(self, causal_lm: PreTrainedModel, separator_id: int) -> None:
        super().__init__(causal_lm)
        self.separator_id = separator_id

    @classmethod
    def load(cls, recipe: Recipe, *, sharded_by: dict[str, Any] | None = None) -> Self:
        """As `Objective.load`; the classifier is new."""
        return cls(load_encoder_for_training(recipe), separator_of(recipe.model.path))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """The pack's share of the loss."""
        return (self.losses(batch) * batch.weights).sum(), {}

    def losses(self, batch: Batch) -> torch.Tensor:
        """As `Objective.losses`; with gradient where there is one."""
        documents = batch.input_ids[0].split(list(batch.document_lengths))
        logits_NC = padded_logits(self.causal_lm, documents, self.separator_id)
        return torch.nn.functional.cross_entropy(logits_NC.float(), batch.targets, reduction="none")

    def probe_logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """As `Objective.probe_logits`, of the document's row."""
        was_training = model.training
        with torch.no_grad():
            logits = padded_logits(model.eval(), [ids.to(model.device)], self.separator_id)
        model.train(was_training)
        return logits.float().cpu()
