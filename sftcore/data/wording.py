"""Prompt templates of a recipe: named or inline, checked for its task; and what else decides a sample's text.

In: a name in assets/prompts.yaml or an inline template of the recipe. Out: a checked `Template`.
Invariant: a template holds exactly the placeholders that its task has, each one it needs.
Trade-off: all mistakes of a template are found without a record (50 microseconds a template).
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sftcore.config import InlineTemplate, Recipe
from sftcore.data.relations import load_relations
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import ASSETS
from sftcore.settings import MatchingSettings
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.content import Form, Message, Pieces, Refusal
from sftcore.tasks.template import Placeholders, Template

WHERE = "data.template"


@cache
def _shipped() -> dict[str, dict[str, str]]:
    templates: dict[str, dict[str, str]] = yaml.safe_load(
        (ASSETS / "prompts.yaml").read_text(encoding="utf-8")
    )
    return templates


def load_template(setting: str | InlineTemplate, *, task: str) -> Template:
    """The template that `setting` means, checked for `task` ("qa" or "matching").

    Raises:
        UserInputError: no such name, or placeholders that are unknown or missing (all of them at once).
    """
    if isinstance(setting, InlineTemplate):
        template = Template(name="inline", prompt=setting.prompt, completion=setting.completion)
    else:
        if setting not in _shipped():
            fitting = _names_of(task)
            near = difflib.get_close_matches(setting, fitting, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "name one of these, or write it inline"
            names = ", ".join(fitting)
            raise UserInputError(
                Problem(what="no such template", where=WHERE, got=setting, allowed=names, remedy=remedy)
            )
        template = Template(name=setting, **_shipped()[setting])
    if problems := _problems(template, _placeholders(task), task):
        raise UserInputError(*problems)
    return template


def _placeholders(task: str) -> Placeholders:
    known = TASKS[task].placeholders
    assert known is not None, "a task with templates has placeholders"
    return known


def _names_of(task: str) -> list[str]:
    """The shipped templates that a task can use."""
    known = _placeholders(task)
    return [
        name for name, texts in _shipped().items() if not _problems(Template(name=name, **texts), known, task)
    ]


def _problems(template: Template, known: Placeholders, task: str) -> list[Problem]:
    where = f"{WHERE} {template.name}"
    checks = (
        ("prompt", template.prompt, known.prompt_needs, known.prompt_allows),
        ("completion", template.completion, ((known.completion_needs,),), (known.completion_needs,)),
    )
    problems = []
    for part, text, needs, allows in checks:
        allowed = ", ".join(map(_braced, allows))
        try:
            fields = list(string.Formatter().parse(text))
        except ValueError as error:
            problems.append(
                Problem(what=f"{part}: {error}", where=where, got=text, remedy="write {{ for a brace")
            )
            continue
        names = [_spelling(field) for field in fields if field[1] is not None]
        unknown = [name for name in names if name not in allows]
        missing = [group for group in needs if not set(group) & set(names)]
        whats = [f"unknown placeholder {_braced(name)} in the {part} of task {task}" for name in unknown]
        whats += [f"no {' or '.join(map(_braced, group))} in the {part} of task {task}" for group in missing]
        problems += [Problem(what=what, where=where, got=text, allowed=allowed) for what in whats]
    return problems


def _braced(name: str) -> str:
    return f"{{{name}}}"


def _spelling(field: tuple[str, str | None, str | None, str | None]) -> str:
    """A placeholder with its format spec and conversion, neither of which is allowed."""
    _, name, spec, conversion = field
    return f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """What of a recipe decides a sample's text.

    Args:
        task: "qa", "matching" or "chat".
        templates: by language ("zh", "en"); "any" where the language doesn't matter.
        matching: label words, language, examples, rationales.
        max_length: tokens in a sample at most.
        overlength: "reject", "trim_prompt" or "error" (an error is a rejection here; prepare raises it).
        relations: `data.relations`.
        own_tokens: `model.add_tokens`, special tokens that texts may hold.
        system: "keep", "merge" or "drop": what becomes of the system's turns in chats.
        train_answers: "all" or "last": which of a chat's answers are trained.
        today: the day that a chat template may ask for; None: none may.
    """

    task: str
    templates: Mapping[str, Template]
    matching: MatchingSettings
    max_length: int
    overlength: str
    relations: str | None = None
    own_tokens: tuple[str, ...] = ()
    system: str = "keep"
    train_answers: str = "all"
    today: date | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> PromptOptions:
        """The options of a recipe.

        Raises:
            UserInputError: an unknown template or wrong placeholders.
        """
        named = TASKS[recipe.task].templates(recipe.data.template, recipe.matching)
        return cls(
            task=recipe.task,
            templates={language: load_template(name, task=recipe.task) for language, name in named.items()},
            matching=recipe.matching,
            max_length=recipe.max_length,
            overlength=recipe.data.overlength,
            relations=recipe.data.relations,
            own_tokens=tuple(recipe.model.add_tokens),
            system=recipe.data.system,
            train_answers=recipe.data.train_answers,
            today=recipe.data.today,
        )

    @property
    def classifies(self) -> bool:
        """Whether samples have a class instead of a completion."""
        return TASKS[self.task].architecture(self.matching) != "decoder"

    @property
    def joins_texts(self) -> bool:
        """Whether the model gets both texts as the tokenizer joins two texts, without a prompt."""
        return TASKS[self.task].architecture(self.matching) == "encoder"

    def form(
        self,
        patterns: Mapping[str, str],
        talk: Callable[[tuple[Message, ...]], Pieces | Refusal] | None = None,
    ) -> Form:
        """The form into which contents are written.

        Args:
            patterns: of questions, by relation.
            talk: turns as the chat template writes them.
        """
        form = Form(
            templates=self.templates, matching=self.matching, patterns=patterns, joins_texts=self.joins_texts
        )
        return form if talk is None else replace(form, talk=talk)

    def identity(self) -> dict[str, Any]:
        """All of it as JSON values, for fingerprints."""
        return {
            "task": self.task,
            "templates": {language: asdict(template) for language, template in self.templates.items()},
            "matching": TASKS[self.task].sample_settings(self.matching),
            "max_length": self.max_length,
            "own_tokens": sorted(self.own_tokens),
            "system": self.system,
            "train_answers": self.train_answers,
            "today": self.today and self.today.isoformat(),
            "overlength": "trim_prompt" if self.overlength == "trim_prompt" else "reject",
        }


def question_patterns(relations: str | None = None) -> dict[str, str]:
    """Question pattern with {subject} of each relation in assets/relations.json, e.g. of "P17".

    Args:
        relations: a file of the user's own, whose patterns come on top.

    Raises:
        UserInputError: it is not such a file.
    """
    found = load_relations(Path(relations) if relations else None)
    return {name: relation.question for name, relation in found.items()}
