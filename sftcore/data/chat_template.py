"""A tokenizer's chat template: which one, and what it writes of some turns.

In: a tokenizer, a fixed day or none. Out: the text of turns, and the stretches that the template marks as an
assistant's (`{% generation %}`).
Invariant: no clock is read: a template that asks for today gets the recipe's day, or is refused.
Trade-off: calls of the clock are found in the template's source (`strftime_now('...')`, as all published
templates write it), since a template can't be handed another clock; a format that is computed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

from sftcore.data.bounded import TookTooMuch, bounded
from sftcore.data.contents import Message
from sftcore.data.rows import has_surrogates
from sftcore.display import shown
from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault

DAY = date(2024, 7, 26)  # of templates that take a day from outside (`date_string`), Llama 3's own default
DAY_FORMAT = "%d %b %Y"
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
OTHER_CLOCK = re.compile(r"strftime_now\s*\(")
MAX_SAID, MAX_RENDERED = 200, 2**26  # letters
MAX_ENDED = 3  # of chats that are ended by force, 10 s each
READS_CLOCK = "the template reads the clock, so samples would depend on the day: set data.today: YYYY-MM-DD"
COMPUTES_CLOCK = (
    "the template reads the clock in a format that it computes, which no fixed day can stand for: "
)
Block = tuple[int, int]
Rendered = tuple[list[str], list[list[Block]]]  # of each chat


class ChatRefused(Exception):
    """A conversation that the template refuses, or whose turns can't be found in its rendering."""


class ChatTemplate:
    """Renders turns with one tokenizer's template.

    Args:
        tokenizer: a fast tokenizer with a template.
        today: the day that a template may ask for; None: it may not ask.

    Raises:
        UserInputError: no template, or several of which none is chosen.
    """

    def __init__(self, tokenizer: Any, today: date | None = None) -> None:
        self.source = template_of(tokenizer)
        self._num_ended = 0  # chats that took too much
        self.has_blocks = bool(GENERATION_TAG.search(self.source))
        self._dated = _without_clock(self.source, today)
        self._values = dict(tokenizer.special_tokens_map) | {
            "date_string": (today or DAY).strftime(DAY_FORMAT)
        }

    def render(self, turns: Sequence[Message], *, prompts: bool = False) -> str:
        """The text of some turns; `prompts`: with what stands before an answer, behind them."""
        return self._rendered(turns, prompts=prompts, marks=False)[0]

    def render_blocks(self, turns: Sequence[Message]) -> tuple[str, list[Block]]:
        """The text of some turns, and (start, end) of what is marked in it."""
        return self._rendered(turns, prompts=False, marks=self.has_blocks)

    def _rendered(self, turns: Sequence[Message], *, prompts: bool, marks: bool) -> tuple[str, list[Block]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not turns:
            raise ChatRefused("there is no turn before the answer")
        values: dict[str, Any] = {
            "chat_template": self._dated,
            "add_generation_prompt": prompts,
            "return_assistant_tokens_mask": marks,
            **self._values,
        }
        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            with bounded():
                texts, blocks = cast(Rendered, render_jinja_template([chat], **values))
        except TemplateError as error:
            said = shown(str(error), MAX_SAID)
            is_ours = said.startswith((READS_CLOCK, COMPUTES_CLOCK))
            raise ChatRefused(said if is_ours else f"the template says: {said}") from error
        except TookTooMuch as error:
            self._num_ended += 1
            if self._num_ended >= MAX_ENDED:
                what = f"{MAX_ENDED} chats took the chat template too much: {error}"
                raise UserInputError(Problem(what=what, where="model.chat_template")) from error
            raise ChatRefused(f"the template takes too much: {error}") from error
        except Exception as error:  # a program of somebody else's may raise anything
            said = f"{type(error).__name__}: {shown(str(error), MAX_SAID)}"
            raise ChatRefused(f"the template fails: {said}") from error
        return _checked(texts[0]), blocks[0] if marks else []


def _checked(text: str) -> str:
    if len(text) > MAX_RENDERED:
        raise ChatRefused(f"the template writes {len(text):,} letters")
    if has_surrogates(text):
        raise ChatRefused("the template writes half a character (\\ud800 to \\udfff)")
    return text


def _without_clock(source: str, today: date | None) -> str:
    """The template with the day in place of each call of the clock."""

    def written(found: re.Match[str]) -> str:
        if today is None:
            return f"raise_exception({READS_CLOCK!r})"
        return repr(today.strftime(found["format"]))

    return OTHER_CLOCK.sub(f"raise_exception({COMPUTES_CLOCK!r} ~ ", CLOCK.sub(written, source))


def template_of(tokenizer: Any) -> str:
    """The template that the tokenizer has, or the default of several.

    Raises:
        UserInputError: there is none.
    """
    template = tokenizer.chat_template
    where = str(tokenizer.name_or_path)
    if isinstance(template, dict) and "default" not in template and template:
        remedy = "choose one: model.chat_template: NAME"
        what = "the tokenizer has several chat templates and no default"
        raise UserInputError(
            Problem(what=what, where=where, allowed=", ".join(sorted(template)), remedy=remedy)
        )
    if not template:
        remedy = (
            "use an instruct model, give one (model.chat_template: FILE), or give `prompt` and `completion`"
            " instead of `messages`"
        )
        raise UserInputError(
            Problem(what="the tokenizer has no chat template", where="model.path", got=where, remedy=remedy)
        )
    return str(template["default"] if isinstance(template, dict) else template)


def choose_template(tokenizer: Any, setting: str) -> str:
    """The text of `model.chat_template`: one of the tokenizer's templates by name, or a file.

    Raises:
        UserInputError: neither.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if setting in named:
        return str(named[setting])
    fault = file_fault(setting)
    try:
        if not fault:
            return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fault = f"can't be read: {error}"
    names = ", ".join(sorted(named)) or "none"
    raise UserInputError(
        Problem(
            what=f"no such chat template ({fault})",
            where="model.chat_template",
            got=setting,
            allowed=f"a Jinja file, or a name of this tokenizer's: {names}",
        )
    )
