"""An objective: a model, and what it is trained for.

In: a `Batch`. Out: the pack's share of the step's loss, and sums that land in metrics.jsonl by their names.
Invariant: losses and metrics of packs add up to those of the step, on any number of ranks.
Trade-off: whoever needs to know of the model before its weights are read (refusals, memory, the schedule)
asks the class, so an objective answers for its model in one file; the base class holds decoders' answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftcore.batching.collate import Batch
from sftcore.batching.packing import IntArray
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.model.demands import check_demands
from sftcore.model.forward import pack_arguments
from sftcore.model.proof import bare_batch
from sftcore.model.sameness import plain_logits
from sftcore.model.trial import Way, try_code
from sftcore.tasks.task import Architecture

Metrics = dict[str, torch.Tensor | float]


class Objective(nn.Module, ABC):
    """A model with a loss.

    Args (attributes):
        auto_class: of transformers, that loads the model.
        num_outputs: rows of its output layer, where they are classes; None: the vocabulary's.
        architecture: of the recipes whose samples it can train on.
        is_shardable: whether ZeRO-3 may cut its weights up as they are read.
        causal_lm: the model; checkpoints name weights by this attribute.
        rates: values of this step's rates by name, put here before each step.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    num_outputs: ClassVar[int | None] = None
    architecture: ClassVar[Architecture] = "decoder"
    is_shardable: ClassVar[bool] = True

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.rates: Mapping[str, float] = {}

    @classmethod
    @abstractmethod
    def load(cls, recipe: Recipe, *, sharded_by: dict[str, Any] | None = None) -> Self:
        """The objective around the recipe's model, which is proven, with its adapter."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        """A pack's share of the loss (a float32 scalar), and sums by name; all packs have the same names."""

    @abstractmethod
    def losses(self, batch: Batch) -> torch.Tensor:
        """(K,) float32 cross-entropy of each of the batch's targets, without gradient."""

    @classmethod
    def try_model(cls, recipe: Recipe, config: Any) -> None:
        """Refuse a model by its configuration and code, before any weight is read.

        Raises:
            UserInputError: it can't be trained so.
        """
        check_demands(recipe, config)
        if cls.architecture != "encoder":  # which runs no packs through a causal LM
            try_code(config, Way.of(recipe, kind=cls.auto_class))

    @classmethod
    def units(cls, recipe: Recipe, store: TokenStore) -> IntArray | None:
        """(num_samples,) number of each sample's unit: those of one share a pack; None: each is its own."""
        return None

    def probe_logits(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits of a document by `model` (this one, or one loaded from an export), on the CPU."""
        return plain_logits(model, ids, **pack_arguments(bare_batch(ids.to(model.device), [len(ids)])))
