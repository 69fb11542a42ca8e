"""New tokens: `model.add_tokens` -> rows in the embedding and the output layer.

In: a model as it was saved, and the tokens. Out: the same model with a row for each, in place.
Invariant: a new row is the mean of the rows there were, on every rank alike: a new token starts as an average
one (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html), not as noise.
Trade-off: an adapter run trains the whole embedding (and a head that is not tied to it), not just the new
rows: V * D more trained weights, which peft and every merge tool understand as `modules_to_save`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sftcore.config import ModelSettings
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import Problem, UserInputError


def new_token_ids(settings: ModelSettings) -> list[int]:
    """Ids of the added tokens that the model's own tokenizer lacks, sorted."""
    if not settings.add_tokens:
        return []
    own = load_tokenizer(settings.path, settings.trust_remote_code)
    known = set(own.get_vocab())
    grown = load_tokenizer(settings.path, settings.trust_remote_code, add_tokens=settings.add_tokens)
    return sorted(grown.convert_tokens_to_ids(token) for token in settings.add_tokens if token not in known)


def grow_vocabulary(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Give the tokens that the model does not know yet a row each.

    Raises:
        UserInputError: the model has other tables by token, which can't grow.
    """
    ids = new_token_ids(settings)
    if not ids:
        return
    num_rows = vocabulary_rows(model)
    check_growth(model, ids)
    if ids[-1] >= num_rows:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    first_unused = min(ids[0], num_rows)  # models often have spare rows, which nothing has trained
    with torch.no_grad():
        for weight in vocabulary_weights(model).values():
            weight[ids] = weight[:first_unused].float().mean(0).to(weight.dtype)


def check_growth(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuse new tokens for a model whose layers look tokens up in tables of their own; a skeleton will do.

    Raises:
        UserInputError: naming these tables.
    """
    if short := [
        f"{name} ({rows} rows)" for name, rows in _other_tables(model) if max(ids, default=-1) >= rows
    ]:
        raise UserInputError(
            Problem(
                what=f"tokens can't be added to model type {model.config.model_type!r}: its layers look "
                "tokens up in a table of their own, too, which has no rows for them",
                where="model.add_tokens",
                got=", ".join(short),
                remedy="leave model.add_tokens out, and write what they stand for in tokens that it knows",
            )
        )


def _other_tables(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Embeddings of tokens besides the first layer's, with their rows (those of each layer in Gemma-3n)."""
    own: Any = model.get_input_embeddings()
    text = model.config.get_text_config().to_dict()
    sizes = {own.num_embeddings, text.get("vocab_size"), text.get("vocab_size_per_layer_input")}
    tables = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m is not own]
    return [(name, table.num_embeddings) for name, table in tables if table.num_embeddings in sizes]


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding."""
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.weight.shape[0]
    return rows


def vocabulary_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The embedding's and the output layer's parameters by name, biases too; tied ones once."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}


def vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Names of both layers, as peft's `modules_to_save` takes them."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
