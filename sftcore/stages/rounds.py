"""Rounds: a list of stages again and again, each round with the last one's output (synthesis, federation).

In: a recipe, stages, how the next round's recipe follows from the last round's folder. Out: a run folder a
round, RUN/rounds/1, 2, ...; in each, last, round.json.
Invariant: a round that has a round.json of this recipe is not done again; one that was killed goes on where
its stages go on.
Trade-off: each round is an ordinary run folder (weights and all), so that every command works on it; N rounds
take N times the disk until somebody deletes the earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of, read_object, write_json
from sftcore.recipe import changed
from sftcore.stages.stage import Stage

log = logging.getLogger("sftcore.rounds")
ROUNDS, DONE = "rounds", "round.json"
NextRecipe = Callable[[Recipe, Path | None], Recipe]  # (the recipe, the last round's folder or None)


def run_rounds(recipe: Recipe, stages: Sequence[Stage], *, num_rounds: int, following: NextRecipe) -> Path:
    """Do the stages that a recipe asks for, `num_rounds` times; returns the last round's folder.

    Args:
        following: the recipe of a round, from the whole's and the last round's folder (None: the first).

    Raises:
        UserInputError: a round was done under another recipe.
    """
    last: Path | None = None
    for number in range(1, num_rounds + 1):
        folder = (recipe.run_folder / ROUNDS / str(number)).resolve()
        of_round = changed(following(recipe, last), run=str(folder))
        fingerprint = fingerprint_of(of_round.model_dump(mode="json"))
        if not _is_done(folder, fingerprint):
            log.info("round %d of %d: %s", number, num_rounds, folder)
            for stage in stages:
                if stage.is_wanted(of_round):
                    stage.run(of_round if stage.takes == "recipe" else folder)
            write_json(folder / DONE, {"round": number, "recipe": fingerprint})
        last = folder
    if last is None:
        raise UserInputError(Problem(what="no round to do", got=str(num_rounds), allowed="1 or more"))
    return last


def _is_done(folder: Path, fingerprint: str) -> bool:
    """Whether a round was done.

    Raises:
        UserInputError: under another recipe.
    """
    path = folder / DONE
    if not path.is_file():
        return False
    found = read_object(path, "recipe")["recipe"]
    if found != fingerprint:
        what, remedy = "this round was done under another recipe", "choose another run folder: --run DIR"
        raise UserInputError(
            Problem(what=what, where=str(path), got=fingerprint, allowed=found, remedy=remedy)
        )
    return True
