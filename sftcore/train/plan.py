"""The plan of a run: a store's lengths and a recipe -> the schedule, and what it follows from.

In: a recipe, a token store, the number of ranks. Out: a `Schedule`; its settings by recipe key.
Invariant: what is planned, trained and resumed comes from the one function.
Trade-off: every rank plans for itself: no plan has to be sent, for 0.2 s with 2 million samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sftcore.batching.mixture import samples_per_epoch, temperature_shares
from sftcore.batching.schedule import CostCoefficients, Schedule
from sftcore.config import DataSettings, Recipe
from sftcore.data.store import TokenStore
from sftcore.errors import Problem, UserInputError
from sftcore.objectives import objective_of


def make_schedule(
    recipe: Recipe, store: TokenStore, *, world: int, cost: CostCoefficients | None = None
) -> Schedule:
    """The plan of a run: a pure function of the store's lengths and the recipe.

    Raises:
        UserInputError: a source that is mixed has no samples, or samples that must share a pack can't.
    """
    return Schedule(
        lengths=store.lengths,
        num_trained=store.num_trained,
        capacity=recipe.batch.capacity,
        seed=recipe.training_seed,
        epochs=recipe.train.epochs,
        world=world,
        samples_per_step=recipe.batch.samples_per_step,
        tokens_per_step=recipe.batch.tokens_per_step,
        cost=cost,
        sources=store.sources,
        source_counts=source_counts(recipe.data, store),
        units=objective_of(recipe).units(recipe, store),
    )


def source_counts(data: DataSettings, store: TokenStore) -> list[int] | None:
    """Samples of each training source in an epoch, if the recipe mixes them; None: each sample once.

    Raises:
        UserInputError: a weighted source has no samples.
    """
    weights = [source.weight for source in data.train if source.weight is not None]
    if not weights and data.temperature is None:
        return None
    sizes = np.bincount(store.sources, minlength=len(data.train)).tolist()
    if 0 in sizes:
        where = f"data.train.{sizes.index(0)}"
        remedy = "see the store's ledger, or take the source out"
        raise UserInputError(
            Problem(what="no sample is left of this mixed source", where=where, remedy=remedy)
        )
    return samples_per_epoch(len(store), weights or temperature_shares(sizes, data.temperature or 1.0))


def plan_settings(schedule: Schedule) -> dict[str, Any]:
    """What decides the content of a plan's steps, by recipe key."""
    return {
        "seed": schedule.seed,
        "train.epochs": schedule.epochs,
        "batch.capacity": schedule.capacity,
        "batch.samples_per_step": schedule.samples_per_step,
        "packs per step": schedule.packs_per_step,
        "number of samples": schedule.num_samples,
        "tokens in an epoch": int(schedule.lengths.sum()),
        "trained tokens in an epoch": int(schedule.num_trained.sum()),
    }
