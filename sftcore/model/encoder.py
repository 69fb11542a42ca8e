"""Encoders (BERT and its kin) as classifiers of pairs: loading one, and its logits.

In: a recipe with `matching.mode: encoder`; token ids of documents. Out: a model with a new classifier;
logits.
Invariant: each row is masked to its document.
Trade-off: rows are padded to the longest document of a batch; sorted by length, 64 rows hold few pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from sftcore.config import Recipe
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.generate.api import batches_by_length
from sftcore.log import progress
from sftcore.model.load import load_config, load_for_decoding, load_pretrained
from sftcore.model.positions import position_limit
from sftcore.precision import torch_dtype
from sftcore.settings import NUM_CLASSES
from sftcore.shares import WHOLE, Share

ROWS_PER_BATCH = 64  # of inference


def is_encoder(config: Any) -> bool:
    """Whether a configuration is that of a bidirectional encoder."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder


def padded_logits(
    classifier: PreTrainedModel, documents: Sequence[torch.Tensor], separator_id: int
) -> torch.Tensor:
    """(N, C) logits of N documents, token ids each, padded on the right to the longest.

    Token types are 0 up to the first separator and 1 after it, where the model tells two texts apart (BERT).
    """
    pad = torch.nn.utils.rnn.pad_sequence
    ids_NL = pad(list(documents), batch_first=True, padding_value=classifier.config.pad_token_id or 0)
    mask_NL = pad([torch.ones_like(document) for document in documents], batch_first=True)
    inputs = {"input_ids": ids_NL, "attention_mask": mask_NL}
    if classifier.config.to_dict().get("type_vocab_size", 1) > 1:
        is_separator = (ids_NL == separator_id).long()
        inputs["token_type_ids"] = ((is_separator.cumsum(1) - is_separator) > 0).long() * mask_NL
    logits: torch.Tensor = classifier(**inputs).logits
    return logits


def load_encoder_for_training(recipe: Recipe) -> PreTrainedModel:
    """The encoder with a new classifier, drawn from the recipe's seed.

    Raises:
        UserInputError: no encoder, or samples may be longer than it has positions.
    """
    config = load_config(recipe.model)
    if problems := _problems(recipe, config):
        raise UserInputError(*problems)
    torch.manual_seed(recipe.training_seed)
    return load_pretrained(
        recipe.model,
        AutoModelForSequenceClassification,
        dtype=torch_dtype(recipe.model),
        attention="sdpa",
        num_labels=NUM_CLASSES,
    )


def _problems(recipe: Recipe, config: Any) -> list[Problem]:
    if not is_encoder(config):
        remedy = "set matching.mode: discriminative"
        what = f"model type {config.model_type!r} is no encoder"
        return [Problem(what=what, where="matching.mode", got="encoder", remedy=remedy)]
    limit = position_limit(config)
    if limit is not None and recipe.max_length > limit:
        return [
            Problem(
                what="samples may be longer than the encoder has positions",
                where="data.max_length",
                got=str(recipe.max_length),
                allowed=f"at most {limit}",
            )
        ]
    return []


def separator_of(path: str) -> int:
    """Id of the token that stands between two texts."""
    separator: int = load_tokenizer(path).sep_token_id
    return separator


@torch.inference_mode()
def encoder_logits(
    recipe: Recipe, folder: str, rows: Sequence[Sequence[int]], *, share: Share = WHOLE
) -> list[list[float] | None]:
    """Per row of token ids: the logits of the classifier in `folder`; None in another job's share."""
    settings = recipe.model.model_copy(update={"path": folder})
    model = load_for_decoding(settings, attention="sdpa", kind=AutoModelForSequenceClassification)
    separator = separator_of(folder)
    results: list[list[float] | None] = [None] * len(rows)
    batches = share.of(batches_by_length(rows, prompts_per_batch=ROWS_PER_BATCH))
    with progress("scoring", sum(map(len, batches))) as advance:
        for batch in batches:
            documents = [torch.tensor(rows[i], device=model.device) for i in batch]
            logits = padded_logits(model, documents, separator).float().tolist()
            for i, row in zip(batch, logits, strict=True):
                results[i] = row
            advance(len(batch))
    return results
