"""Task qa: facts in a template, graded by containment; prompts with completions next to them.

In: `entityquestions`, `facts`, `jsonl`. Out: see `task.Task`.
Invariant: facts are selected by memory level, whatever they are about.
Trade-off: one template for all languages: a text is put into it as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sftcore.knowledge.containment import AliasTable
from sftcore.settings import MatchingSettings
from sftcore.tasks.formats import examples, facts, questions
from sftcore.tasks.kinds.content import Content
from sftcore.tasks.task import Architecture, Sections, Setting
from sftcore.tasks.template import Placeholders

formats = {"entityquestions": questions, "facts": facts, "jsonl": examples}
selects_by: Literal["levels"] = "levels"
balances = ("relation", "level", "none")
placeholders: Placeholders | None = Placeholders(
    prompt_needs=(("question", "subject"),),
    prompt_allows=("question", "subject"),
    completion_needs="answer",
)
has_facts = True
talks = False
answers: Literal["texts"] = "texts"


def faults(recipe: Sections) -> Iterator[str]:
    """None: it has no section of its own."""
    yield from ()


def architecture(settings: MatchingSettings) -> Architecture:
    """Always a causal LM."""
    return "decoder"


def templates(setting: Setting, settings: MatchingSettings) -> dict[str, Setting]:
    """The one that the recipe names."""
    return {"any": setting}


def sample_settings(settings: MatchingSettings) -> dict[str, Any] | None:
    """None: it has no section of its own."""
    return None


def answered_by(settings: MatchingSettings) -> Literal["generation"]:
    """The text that is generated."""
    return "generation"


def needs_reasons(settings: MatchingSettings) -> bool:
    """Facts have no reasons."""
    return False


def with_examples(settings: MatchingSettings, contents: Sequence[Content]) -> MatchingSettings | None:
    """Solved examples are text before the prompt."""
    return None


def grading(settings: MatchingSettings, *, has_learnt: bool) -> dict[str, Any]:
    """Other names of answers count, too."""
    return {"aliases_fingerprint": AliasTable.load().fingerprint()}


def more_scores(golds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy says all."""
    return {}
