"""What a task decides: one Protocol, which each module of a task fulfils.

In: values of a recipe, contents of records. Out: formats, texts, how answers are got and graded.
Invariant: what differs by task stands in its module; nothing outside asks for a task's name.
Trade-off: tasks stand below the recipe (so that it can ask them what it may hold) and know no model, no file
and no tokenizer: they say what is to be done, others do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from sftcore.settings import AdapterSettings, MatchingSettings, TrainSettings
from sftcore.sources import InlineTemplate
from sftcore.tasks.formats import Reader
from sftcore.tasks.kinds.content import Content
from sftcore.tasks.template import Placeholders

Architecture = Literal["decoder", "classifier", "encoder"]
Setting = str | InlineTemplate


class Sections(Protocol):
    """The sections of a recipe that tasks check."""

    @property
    def adapter(self) -> AdapterSettings: ...
    @property
    def matching(self) -> MatchingSettings: ...
    @property
    def train(self) -> TrainSettings: ...


class Task(Protocol):
    """What a model is trained to do.

    Args:
        formats: of the sources that it reads, each with what makes contents of rows.
        selects_by: how `select` draws records: by memory level, or equally many of each label.
        balances: values that `select.balance` may have, the default first.
        placeholders: of its templates; None: it has none.
        has_facts: facts are among its records, with questions from their relations' patterns.
        talks: a text is a turn of the user's, and goes through the model's chat template.
        answers: what is graded, the text of a reply or a label.
    """

    @property
    def formats(self) -> Mapping[str, Reader]: ...
    @property
    def selects_by(self) -> Literal["levels", "labels"]: ...
    @property
    def balances(self) -> tuple[str, ...]: ...
    @property
    def placeholders(self) -> Placeholders | None: ...
    @property
    def has_facts(self) -> bool: ...
    @property
    def talks(self) -> bool: ...
    @property
    def answers(self) -> Literal["texts", "labels"]: ...

    def faults(self, recipe: Sections) -> Iterator[str]:
        """What the recipe asks for that this task can't do."""

    def architecture(self, settings: MatchingSettings) -> Architecture:
        """What is trained: a causal LM, one with a classifier, or an encoder with one."""

    def templates(self, setting: Setting, settings: MatchingSettings) -> dict[str, Setting]:
        """Names of templates (or an inline one) by language; "any" where the language doesn't matter.

        Args:
            setting: `data.template`.
        """

    def sample_settings(self, settings: MatchingSettings) -> dict[str, Any] | None:
        """The values of its own section that decide samples, for fingerprints."""

    def answered_by(self, settings: MatchingSettings) -> Literal["generation", "likelihood", "class"]:
        """How an answer is got from a model."""

    def needs_reasons(self, settings: MatchingSettings) -> bool:
        """Whether only records with a reason are trained on."""

    def with_examples(
        self, settings: MatchingSettings, contents: Sequence[Content]
    ) -> MatchingSettings | None:
        """The section whose prompts begin with these solved records; None: examples are text before it."""

    def grading(self, settings: MatchingSettings, *, has_learnt: bool) -> dict[str, Any]:
        """What grades depend on beside model, items and prompts, for manifests.

        Args:
            has_learnt: the model was trained on this task by us.
        """

    def more_scores(self, golds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What scores.json says beyond accuracy.

        Args:
            golds: `Content.gold` of each record.
            rows: of predictions.jsonl, one for each record.
        """
