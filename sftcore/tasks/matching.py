"""Task matching: pairs of texts -> same or different, as a label's word or as a class.

In: `pairs`. Out: see `task.Task`.
Invariant: a class has no words: what needs text (rationales, likelihoods) is refused with it, by name.
Trade-off: its section decides much (mode, prompt, label words, rationale), so most functions look at it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from sftcore.settings import MatchingSettings, PairExample
from sftcore.tasks.formats import pairs
from sftcore.tasks.kinds.content import Content
from sftcore.tasks.kinds.pair import LANGUAGES, pair_in
from sftcore.tasks.task import Architecture, Sections, Setting
from sftcore.tasks.template import DEFAULT_TEMPLATE, Placeholders

formats = {"pairs": pairs}
selects_by: Literal["labels"] = "labels"
balances = ("label", "none")
placeholders: Placeholders | None = Placeholders(
    prompt_needs=(("a",), ("b",)),
    prompt_allows=("a", "b", "label_0", "label_1"),
    completion_needs="label",
)
has_facts = False
talks = False
answers: Literal["labels"] = "labels"
ARCHITECTURES: dict[str, Architecture] = {
    "generative": "decoder",
    "discriminative": "classifier",
    "encoder": "encoder",
}
NOT_OF_SAMPLES = ("predict", "normalise", "teacher")  # keys of `matching` that decide no sample


def faults(recipe: Sections) -> Iterator[str]:
    """Adapters and optimizers that a classifier or an encoder can't have."""
    mode, adapter = recipe.matching.mode, recipe.adapter.kind
    trained = architecture(recipe.matching)
    if trained != "decoder" and adapter == "qlora":
        yield f"matching.mode {mode} has no 4-bit weights: set adapter.kind: none or lora"
    if trained == "encoder" and adapter != "none":
        yield "matching.mode encoder trains all weights: set adapter.kind: none"
    if trained == "encoder" and recipe.train.optimizer == "muon":
        yield "train.optimizer: muon is for decoders: set adamw"


def architecture(settings: MatchingSettings) -> Architecture:
    """As `matching.mode` says."""
    return ARCHITECTURES[settings.mode]


def templates(setting: Setting, settings: MatchingSettings) -> dict[str, Setting]:
    """`matching.prompt` in both languages, unless a template was given."""
    if setting != DEFAULT_TEMPLATE:
        return {"any": setting}
    asks_why = settings.prompt == "complex" and settings.rationale != "none"
    kind = f"complex-{settings.rationale}" if asks_why else settings.prompt
    wording = f"-{settings.wording}" if settings.wording else ""
    return {language: f"matching-{kind}-{language}{wording}" for language in LANGUAGES}


def sample_settings(settings: MatchingSettings) -> dict[str, Any] | None:
    """The section without what only predictions depend on."""
    return settings.model_dump(mode="json", exclude=set(NOT_OF_SAMPLES))


def answered_by(settings: MatchingSettings) -> Literal["generation", "likelihood", "class"]:
    """By its class, by its text's likelihood, or by what is generated."""
    if architecture(settings) != "decoder":
        return "class"
    return "likelihood" if settings.compares_likelihoods else "generation"


def needs_reasons(settings: MatchingSettings) -> bool:
    """Where answers hold a rationale."""
    return settings.rationale != "none"


def with_examples(settings: MatchingSettings, contents: Sequence[Content]) -> MatchingSettings | None:
    """The section with these pairs after its own examples.

    Their rationales come along: an answer without one would show another form than the one that is read.
    """
    shown = [PairExample.model_validate(asdict(pair_in(content))) for content in contents]
    return settings.model_copy(update={"examples": [*settings.examples, *shown]})


def grading(settings: MatchingSettings, *, has_learnt: bool) -> dict[str, Any]:
    """The section, and whether a label's text ends with the stop token."""
    ends = {} if has_learnt else {"labels": "compared without stop token"}
    return {"matching": settings.model_dump(mode="json"), **ends}


def more_scores(golds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each split: how many, unparsable, and the shares of "same" and of the larger class."""
    found = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        here = [(gold, row) for gold, row in zip(golds, rows, strict=True) if row["split"] == split]
        gold = Counter(label for label, _ in here)
        same = [row["correct"] == (label == 1) for label, row in here if row["parsed"]]
        found[split] = {
            "n": len(here),
            "unparsable": sum(not row["parsed"] for _, row in here),
            "majority_accuracy": max(gold.values()) / len(here),
            "predicted_same": sum(same) / len(here),
            "gold_same": gold[1] / len(here),
        }
    return {"pairs": found}
