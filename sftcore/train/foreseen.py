"""What training refuses of a model's layers, found on a skeleton without weights: in plans, and first of all.

In: a recipe, its DeepSpeed configuration. Out: nothing, or the refusal that training would end with.
Invariant: the checks are those that training makes again with the weights.
Trade-off: the skeleton (0.1 to 2 s) is built only where an answer hangs on it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from sftcore.config import Recipe
from sftcore.model.merge import skeleton_of
from sftcore.model.miniature import BREAKS
from sftcore.model.vocabulary import check_growth, new_token_ids
from sftcore.precision import dtype_of
from sftcore.train.casting import check_sharding
from sftcore.train.ds_config import zero_stage

log = logging.getLogger(__name__)


def check_layers(recipe: Recipe, ds_config: dict[str, Any]) -> None:
    """Refuse weights that ZeRO-3 can't keep in float32, and tokens that the layers have no rows for.

    Raises:
        UserInputError: as training does.
    """
    if recipe.architecture == "encoder":
        return
    stage, ids = zero_stage(ds_config), new_token_ids(recipe.model)
    if not ids and (stage < 3 or dtype_of(recipe.model) != "bfloat16"):
        return
    try:
        skeleton = skeleton_of(recipe.model)
    except BREAKS as error:
        log.info("no skeleton of this model (%s): its weights are tried", error)
        return
    check_growth(skeleton, ids)
    if dtype_of(recipe.model) == "bfloat16":
        nn.Module.to(skeleton, torch.bfloat16)
        check_sharding(skeleton, stage=stage)
