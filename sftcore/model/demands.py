"""What a model's configuration asks for and training doesn't give: refused by name, or said in one line.

In: a recipe and its model's configuration. Out: nothing, or a `UserInputError`; warnings in the log.
Invariant: nothing that the configuration asks of training is dropped in silence.
Trade-off: read from the configuration alone, before anything is tokenised or loaded; what it does not tell,
`proof` finds out after loading.
"""

from __future__ import annotations

import logging
from typing import Any

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.model.adapter_files import check_continued
from sftcore.model.positions import position_limit
from sftcore.model.prequantised import already_quantised

log = logging.getLogger(__name__)
ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_coef")
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def check_demands(recipe: Recipe, config: Any) -> None:
    """Refuse a model that training would not treat as its configuration says (`encoder` checks more).

    Raises:
        UserInputError: its weights are quantised, samples may be longer than it has positions, its routers
            have a loss of their own, or the adapter to go on from can't be trained on.
    """
    is_encoder = recipe.architecture == "encoder"
    checks = (already_quantised,) if is_encoder else (already_quantised, _short_table, _router_loss)
    if problems := [problem for check in checks if (problem := check(recipe, config))]:
        raise UserInputError(*problems)
    check_continued(recipe)


def _short_table(recipe: Recipe, config: Any) -> Problem | None:
    limit = position_limit(config)
    if limit is None or recipe.max_length <= limit:
        return None
    return Problem(
        what=f"samples may be longer than the table of positions of model type {config.model_type!r}",
        where="data.max_length",
        got=str(recipe.max_length) + ("" if recipe.data.max_length else " (batch.capacity)"),
        allowed=f"at most {limit}",
        remedy=f"set data.max_length: {limit}; longer samples are then rejected by name",
    )


def _router_loss(recipe: Recipe, config: Any) -> Problem | None:
    name, share = _first_set(config, ROUTER_LOSSES)
    values = config.get_text_config().to_dict()
    if recipe.classifies or not share or not values.get("output_router_logits"):
        return None
    return Problem(
        what=f"model type {config.model_type!r} asks for a loss of its routers, which training doesn't have",
        where=f"config.json of {recipe.model.path}",
        got=f"output_router_logits: true, {name}: {share}",
        remedy="set output_router_logits: false there to train without it",
    )


def warn_of_ignored(config: Any) -> None:
    """Say what of the configuration does not take part in training."""
    name, rate = _first_set(config, ATTENTION_DROPOUTS)
    if rate:
        log.warning("%s: %s of the model's config.json is taken as 0 in training", name, rate)
    name, share = _first_set(config, ROUTER_LOSSES)
    if share:
        log.warning("%s: %s of the model's config.json is not trained: no loss of routers", name, share)


def _first_set(config: Any, names: tuple[str, ...]) -> tuple[str, float]:
    """The first of these keys with a number that is not 0, and the number; or 0."""
    values = config.get_text_config().to_dict()
    return next(((name, values[name]) for name in names if values.get(name)), ("", 0.0))
