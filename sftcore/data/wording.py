"""Prompt templates: where the texts of a record go.

In: a name in assets/prompts.yaml or an inline template of the recipe. Out: a checked `Template`.
Invariant: a template holds exactly the placeholders that its task has, each one it needs, and text that is
put in is never read as a placeholder again.
Trade-off: placeholders are plain names, no format specs or attributes: str.format on a user's text would let
`{question.__class__}` through (cost: about 1 microsecond per text for joining the parts ourselves).
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sftcore.config import DataSettings, InlineTemplate, Recipe
from sftcore.data.contents import Fact, Pair
from sftcore.data.relations import load_relations
from sftcore.errors import Problem, UserInputError
from sftcore.recipe import ASSETS
from sftcore.settings import MatchingSettings

CJK_LETTER_SHARE = 0.1  # of a pair's letters; 5 of the 4,000 PAWS-X Chinese pairs lie below it (2026-11)
WHERE = "data.template"
LANGUAGES = ("zh", "en")
NOT_OF_SAMPLES = ("predict", "normalise", "teacher")  # keys of `matching` that decide no sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholders:
    """What a task's templates may and must hold (of `prompt_needs`, one is enough)."""

    prompt_needs: tuple[tuple[str, ...], ...]
    prompt_allows: tuple[str, ...]
    completion_needs: str


PLACEHOLDERS = {
    "qa": Placeholders(
        prompt_needs=(("question", "subject"),),
        prompt_allows=("question", "subject"),
        completion_needs="answer",
    ),
    "matching": Placeholders(
        prompt_needs=(("a",), ("b",)),
        prompt_allows=("a", "b", "label_0", "label_1"),
        completion_needs="label",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt and a completion with {placeholders}; "{{" stands for a brace."""

    name: str
    prompt: str
    completion: str

    @property
    def placeholders(self) -> frozenset[str]:
        """Names in the prompt."""
        return frozenset(name for _, name in _parts(self.prompt) if name)

    def fill(self, values: Mapping[str, str]) -> tuple[str, str]:
        """Prompt and completion with `values` put in.

        >>> Template(name="t", prompt="Q: {question}", completion=" {answer}").fill(
        ...     {"question": "Is {answer} a word?", "answer": "Yes"}
        ... )
        ('Q: Is {answer} a word?', ' Yes')
        """
        return _filled(self.prompt, values), _filled(self.completion, values)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return "".join(part + (values[name] if name else "") for part, name in _parts(text))


@cache
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(text))


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
    if problems := _problems(template, PLACEHOLDERS[task], task):
        raise UserInputError(*problems)
    return template


def _names_of(task: str) -> list[str]:
    """The shipped templates that a task can use."""
    known = PLACEHOLDERS[task]
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
        return cls(
            task=recipe.task,
            templates=_templates(recipe),
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
        return self.task == "matching" and self.matching.mode != "generative"

    @property
    def joins_texts(self) -> bool:
        """Whether the model gets both texts as the tokenizer joins two texts, without a prompt."""
        return self.task == "matching" and self.matching.mode == "encoder"

    def identity(self) -> dict[str, Any]:
        """All of it as JSON values, for fingerprints."""
        return {
            "task": self.task,
            "templates": {language: asdict(template) for language, template in self.templates.items()},
            "matching": self.matching.model_dump(mode="json", exclude=set(NOT_OF_SAMPLES))
            if self.task == "matching"
            else None,
            "max_length": self.max_length,
            "own_tokens": sorted(self.own_tokens),
            "system": self.system,
            "train_answers": self.train_answers,
            "today": self.today and self.today.isoformat(),
            "overlength": "trim_prompt" if self.overlength == "trim_prompt" else "reject",
        }


def _templates(recipe: Recipe) -> dict[str, Template]:
    """`data.template`; for matching, `matching.prompt` in both languages unless a template was given."""
    setting = recipe.data.template
    if recipe.task == "chat":
        return {}
    if recipe.task == "matching" and setting == DataSettings.model_fields["template"].default:
        names = {language: _matching_name(recipe.matching, language) for language in LANGUAGES}
        return {language: load_template(name, task="matching") for language, name in names.items()}
    return {"any": load_template(setting, task=recipe.task)}


def _matching_name(settings: MatchingSettings, language: str) -> str:
    """Name of the shipped template that the settings ask for."""
    asks_why = settings.prompt == "complex" and settings.rationale != "none"
    kind = f"complex-{settings.rationale}" if asks_why else settings.prompt
    return f"matching-{kind}-{language}" + (f"-{settings.wording}" if settings.wording else "")


def language_of(pair: Pair, setting: str) -> str:
    """ "zh" or "en": `matching.language`, or by the pair's script if that is "auto".

    >>> language_of(Pair(a="北京 Beijing", b="上海", label=0), "auto")
    'zh'
    """
    if setting != "auto":
        return setting
    letters = [char for char in pair.a + pair.b if char.isalpha()]
    num_cjk = sum("\u3400" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0003ffff" for char in letters)
    return "zh" if letters and num_cjk >= CJK_LETTER_SHARE * len(letters) else "en"


def with_question(fact: Fact, patterns: Mapping[str, str]) -> Fact:
    """The fact with its relation's question if it has none of its own."""
    if fact.question is not None or fact.relation not in patterns:
        return fact
    return replace(fact, question=patterns[fact.relation].replace("{subject}", fact.subject))


def fact_texts(fact: Fact, template: Template) -> tuple[str, str]:
    """Prompt and completion of a fact."""
    values = {"question": fact.question or "", "subject": fact.subject}
    return template.fill(values | {"answer": fact.answers[0]})


def question_patterns(relations: str | None = None) -> dict[str, str]:
    """Question pattern with {subject} of each relation in assets/relations.json, e.g. of "P17".

    Args:
        relations: a file of the user's own, whose patterns come on top.

    Raises:
        UserInputError: it is not such a file.
    """
    found = load_relations(Path(relations) if relations else None)
    return {name: relation.question for name, relation in found.items()}
