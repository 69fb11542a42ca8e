"""Objectives: what a model can be trained for, a file each; which one is a recipe's is decided here.

In: a recipe. Out: the objective's class, or the objective around its model.
Invariant: `OBJECTIVES` is all the registry there is: a new objective is a file and a line in it.
Trade-off: a recipe's name for an objective is checked when it is used, for a recipe is parsed without torch.
"""

from __future__ import annotations

import difflib
from typing import Any

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.objectives.classify import Classify
from sftcore.objectives.encode import Encode
from sftcore.objectives.next_token import NextToken
from sftcore.objectives.objective import Metrics as Metrics
from sftcore.objectives.objective import Objective as Objective

OBJECTIVES: dict[str, type[Objective]] = {  # the first of each architecture is what auto means
    "next_token": NextToken,
    "classify": Classify,
    "encode": Encode,
}


def objective_of(recipe: Recipe) -> type[Objective]:
    """What a recipe's model is trained for: as `objective.name` says, or (auto) as its samples need.

    Raises:
        UserInputError: there is no such objective, or it is for samples of another kind.
    """
    name = recipe.objective.name
    fitting = {key: each for key, each in OBJECTIVES.items() if each.architecture == recipe.architecture}
    if name == "auto":
        return next(iter(fitting.values()))
    if name in fitting:
        return fitting[name]
    near = difflib.get_close_matches(name, fitting, n=1)
    raise UserInputError(
        Problem(
            what=f"no objective for the samples of task {recipe.task}",
            where="objective.name",
            got=name,
            allowed=", ".join(["auto", *fitting]),
            remedy=f"did you mean {near[0]!r}?" if near else "",
        )
    )


def load_objective(recipe: Recipe, *, sharded_by: dict[str, Any] | None = None) -> Objective:
    """The recipe's objective around its model, proven, with its adapter.

    Args:
        sharded_by: a ZeRO-3 configuration of DeepSpeed: see `load_for_training`.
    """
    return objective_of(recipe).load(recipe, sharded_by=sharded_by)
