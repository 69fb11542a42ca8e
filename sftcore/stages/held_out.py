"""Which held-out items can be scored, asked before training and again by the evaluation itself.

In: a resolved recipe, a model folder or hub name. Out: records; the others in RUN/ledger.SPLIT.jsonl.
Invariant: what is refused here is refused before anything is decoded, and by `sftcore plan` and `run` before
anything is trained.
Trade-off: held-out files are read and their chats rendered once more than evaluation needs (about a second
for 20,000 questions).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sftcore.config import Recipe
from sftcore.data.ledger import REMEDIES, Ledger, Reason
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.tokens import Tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.pairs import reject_overlong
from sftcore.evaluate.replies import reject_unscorable
from sftcore.stages.prepare import recipe_tokenizer, usable_records

log = logging.getLogger("sftcore.evaluating")


def check_scorable(recipe: Recipe) -> None:
    """Refuse, before anything is paid for, held-out data of which `evaluate` could score nothing.

    Raises:
        UserInputError: as `evaluate` for the base model's items, if the recipe has held-out sources.
    """
    if recipe.data.test or recipe.data.ood:
        scorable_records(recipe, recipe.model.path, recipe_tokenizer(recipe), None)


def scorable_records(recipe: Recipe, folder: str, tokenizer: Tokenizer, run: Path | None) -> list[Record]:
    """The held-out items that the model in `folder` can be scored on.

    Args:
        run: where the others are listed; None: nowhere.

    Raises:
        UserInputError: there are none, and why; or chats after solved examples.
    """
    if not (recipe.data.test or recipe.data.ood):
        what = "is empty: there is nothing to score"
        remedy = "name held-out files there, or in data.ood"
        raise UserInputError(Problem(what=what, where="data.test", remedy=remedy))
    rejected: Counter[str] = Counter()
    fit = fitting(recipe, folder, tokenizer)

    def fit_and_count(records: list[Record], ledger: Ledger) -> list[Record]:
        kept = fit(records, ledger)
        rejected.update(ledger.rejected_by_reason)
        return kept

    records = usable_records(recipe, run, "test", "ood", fit=fit_and_count)
    if not records:
        counts = ", ".join(f"{reason}: {n}" for reason, n in rejected.items())
        remedies = [REMEDIES[Reason(reason)] for reason in rejected if reason in REMEDIES]
        listed = f" (what was dropped is listed in {run}/ledger.test.jsonl)" if run else ""
        remedy = "; ".join([*remedies, f"give held-out sources there{listed}"])
        raise UserInputError(
            Problem(what="nothing to evaluate on", where="data.test", got=counts, remedy=remedy)
        )
    if recipe.evaluate.few_shot and not all(record.content.is_bare for record in records):
        what = "solved chats can't be put before a chat"
        raise UserInputError(Problem(what=what, where="evaluate.few_shot", remedy="set it to 0"))
    return records


def fitting(
    recipe: Recipe, folder: str, tokenizer: Tokenizer
) -> Callable[[list[Record], Ledger], list[Record]]:
    """Rejects what has no reply to compare with, or is longer than the model has positions for."""
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)

    def fit(found: list[Record], ledger: Ledger) -> list[Record]:
        records = reject_unscorable(found, prompter, ledger, max_new_tokens=recipe.evaluate.max_new_tokens)
        kept = reject_overlong(recipe, folder, records, prompter, ledger)
        if len(kept) < len(records):
            log.warning(
                "%d of %d held-out items are longer than the model's positions and not scored; the ledger"
                " lists them",
                len(records) - len(kept),
                len(records),
            )
        return kept

    return fit
