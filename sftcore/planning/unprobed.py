"""A plan before the probe: as if any facts had the wanted levels, and what the probe itself will cost.

In: a recipe that selects by memory level. Out: the training samples of that many facts; the probe's counts
and seconds.
Invariant: nothing is written to the run folder, and the facts are drawn by the rules of `select`.
Trade-off: facts of other levels may have longer names, so tokens and time are right to some per cent only;
`plan` says so, and is exact once the probe has run.
"""

from __future__ import annotations

from typing import Any

from sftcore.amounts import counted, duration
from sftcore.config import Recipe
from sftcore.data.prepare import prepare_store
from sftcore.data.store import TokenStore
from sftcore.data.tokens import Tokenizer
from sftcore.knowledge.level_files import holds_levels
from sftcore.knowledge.levels import MAX_LEVEL, FactLevel
from sftcore.knowledge.questions import fact_of
from sftcore.knowledge.selection import select_facts
from sftcore.planning.estimate import probe_seconds
from sftcore.stages.prepare import MEASURED, recipe_tokenizer, usable_records
from sftcore.train.devices import Device

Row = dict[str, Any]
SAMPLING = "sampling"


def awaits_probe(recipe: Recipe) -> bool:
    """Whether training needs memory levels that the run folder doesn't hold yet."""
    return recipe.selects_by_level and not holds_levels(recipe.run_folder)


def prepare_any_facts(recipe: Recipe) -> tuple[Tokenizer, TokenStore]:
    """The token store of as many facts as the recipe selects, whatever their level.

    Raises:
        UserInputError: bad data, or fewer facts than the recipe wants.
    """
    assert recipe.select is not None and recipe.select.balance != "label"
    wanted = sorted(set(recipe.select.levels))
    facts = []
    for number, record in enumerate(usable_records(recipe, None, "train")):
        fact = fact_of(record)
        facts.append(
            FactLevel(
                id=record.id,
                relation=fact.relation,
                subject=fact.subject,
                answers=fact.answers,
                hits=wanted[number % len(wanted)],
                trials=MAX_LEVEL,  # so that the level is the number of hits
                split=record.split,
            )
        )
    chosen = select_facts(
        facts,
        levels_wanted=wanted,
        n=recipe.select.n,
        balance=recipe.select.balance,
        seed=recipe.seed,
        draw=recipe.select.draw,
    )
    tokenizer = recipe_tokenizer(recipe)
    return tokenizer, prepare_store(recipe, tokenizer, only_ids={fact.id for fact in chosen})


def describe_probe(recipe: Recipe, device: Device) -> Row:
    """How much a probe measures, and how long that takes on `device`; None where its rate is not known."""
    settings = recipe.probe
    num_facts = len(usable_records(recipe, None, *MEASURED))
    num_prompts = num_facts * settings.templates
    return {
        "num_facts": num_facts,
        "num_prompts": num_prompts,
        "num_completions": num_prompts * settings.samples if settings.estimator == SAMPLING else 0,
        "seconds": probe_seconds(recipe, num_prompts, device),
    }


def probe_note(recipe: Recipe, probe: Row) -> str:
    """What a plan says of the probe to come."""
    assert recipe.select is not None
    facts = "all facts" if recipe.select.n == "all" else f"any {counted(recipe.select.n, 'fact')}"
    settings = recipe.probe
    tokens = counted(settings.max_new_tokens, "token")
    drawn = f" = {counted(probe['num_completions'], 'completion')} of up to {tokens}"
    of = f"{counted(probe['num_facts'], 'fact')} x {counted(settings.templates, 'wording')}"
    samples = f" x {counted(settings.samples, 'sample')}{drawn}"
    of += samples if probe["num_completions"] else ", by likelihood"
    time = "" if probe["seconds"] is None else f", about {duration(probe['seconds'])}"
    return f"no memory levels yet: planned as if {facts} were drawn. The probe (sftcore probe): {of}{time}"
