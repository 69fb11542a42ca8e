"""Decoders as classifiers of documents: one class per document, in packs, with or instead of a plain layer.

In: a recipe with `matching.mode: discriminative`. Out: a model with a new classifier; states of
documents; a classifier's file.
Invariant: what training saves of a classifier is what inference puts in the vocabulary's place.
Trade-off: with `pooling: mean` or `layers: 2` the weights are no `...ForSequenceClassification` of
transformers any more: the decoder and `classifier.safetensors` are saved apart, and only `sftcore match` puts
them together, rather than that plain transformers loads them and gives other logits in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sftcore.batching.collate import Batch
from sftcore.config import Recipe
from sftcore.model.adapters import CLASSIFIER
from sftcore.model.load import load_for_training
from sftcore.settings import NUM_CLASSES

CLASSIFIER_FILE = "classifier.safetensors"
Named = tuple[str, torch.Tensor]


class TwoLayerHead(nn.Module):
    """A hidden layer of the decoder's width with tanh, then the output layer (as BERT's pooler has it)."""

    def __init__(self, out: nn.Linear) -> None:
        super().__init__()
        weight = out.weight
        self.dense = nn.Linear(out.in_features, out.in_features, device=weight.device, dtype=weight.dtype)
        self.out = out

    def forward(self, hidden: torch.Tensor, *targets_and_weights: torch.Tensor) -> torch.Tensor:
        """As the output layer's: logits, or the loss."""
        output: torch.Tensor = self.out(torch.tanh(self.dense(hidden)), *targets_and_weights)
        return output


def mean_states(hidden_TD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(K, D) mean state of each document that has a class, summed in float32."""
    lengths = torch.tensor(batch.document_lengths, device=hidden_TD.device)
    numbers = torch.arange(len(lengths), device=hidden_TD.device)
    document_T = torch.repeat_interleave(numbers, lengths, output_size=len(hidden_TD))
    sums_ND = hidden_TD.new_zeros(len(lengths), hidden_TD.shape[1], dtype=torch.float32)
    sums_ND = sums_ND.index_add(0, document_T, hidden_TD.float())
    return (sums_ND / lengths[:, None])[document_T[batch.trained_index]].to(hidden_TD.dtype)


def load_classifier_for_training(recipe: Recipe) -> PreTrainedModel:
    """The model with a new classifier in the place of the vocabulary.

    Samples for it have one label, at their last position: the class. Everything else is as for a causal LM.
    The output layer begins at zero, as adapters do: random logits (a loss of 2 to 3 for Gemma-3-270M, with a
    gradient norm of 300) sent the first updates astray, and some runs never came back.
    """
    torch.manual_seed(recipe.training_seed)  # of a hidden layer's first weights, the same on all ranks
    model: Any = load_for_training(recipe, kind=AutoModelForSequenceClassification, num_labels=NUM_CLASSES)
    nn.init.zeros_(model.score.weight)
    if recipe.matching.layers == 2:
        model.score = TwoLayerHead(model.score)
    classifier: PreTrainedModel = model
    return classifier


def restore_classifier(model: Any, folder: Path) -> None:
    """Put the classifier of a folder, if it has one of its own, in the place of the model's, in place."""
    file = folder / CLASSIFIER_FILE
    if not file.is_file():
        return
    weights = {name.removeprefix(f"{CLASSIFIER}."): t for name, t in load_file(file).items()}
    if "dense.weight" in weights:
        model.score = TwoLayerHead(model.score)
    model.score.load_state_dict(weights)
    model.score.to(model.device, model.dtype)


def take_classifier(weights: Iterable[Named], taken: dict[str, torch.Tensor]) -> Iterator[Named]:
    """The weights as they come, but for the classifier's, which go into `taken`."""
    for name, tensor in weights:
        if name.startswith(f"{CLASSIFIER}."):
            taken[name] = tensor.contiguous()
        else:
            yield name, tensor
