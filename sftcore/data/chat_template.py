"""A tokenizer's chat template: which one, and what it writes of some turns.

In: a tokenizer, a fixed day or none. Out: the text of turns, and the stretches that the template marks as an
assistant's (`{% generation %}`).
Invariant: no clock is read: a template that asks for today gets the recipe's day, or is refused; so is one
that writes what differs from run to run (a random choice, an object's address).
Trade-off: the clock is replaced among the compiled template's globals, in a copy of the template under a
comment of ours that no other caller compiles (0.3 microseconds a rendering to find it).
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
MAX_SAID, MAX_RENDERED = 200, 2**26  # letters
MAX_ENDED = 3  # of chats that are ended by force, 10 s each
READS_CLOCK = "the template reads the clock, so samples would depend on the day: set data.today: YYYY-MM-DD"
WRITES_CLOCK = "the template writes the clock itself, not a day of it"
DRAWS = "the template draws at random, so samples would differ from run to run"
ADDRESS = " at 0x"  # how Python writes an object that has no text of its own
Block = tuple[int, int]
Rendered = tuple[list[str], list[list[Block]]]  # of each chat


class ChatRefused(Exception):
    """A conversation that the template refuses, or whose turns can't be found in its rendering."""


class _Clock:
    """What a template finds under `strftime_now`: one day, or None, which refuses."""

    def __init__(self, today: date | None) -> None:
        self._today = today

    def __call__(self, format: str) -> str:
        if self._today is None:
            raise ChatRefused(READS_CLOCK)
        return self._today.strftime(format)

    def __repr__(self) -> str:
        raise ChatRefused(WRITES_CLOCK)


def _drawn(*_: Any, **__: Any) -> str:
    raise ChatRefused(DRAWS)


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
        self._clock = _Clock(today)
        # a comment and the line end that goes with it are no text, so the rendering is the source's
        self._dated = f"{{# the day is {today} #}}\n{self.source}"
        self._values = dict(tokenizer.special_tokens_map) | {
            "date_string": (today or DAY).strftime(DAY_FORMAT)
        }

    def render(self, turns: Sequence[Message], *, prompts: bool = False) -> str:
        """The text of some turns; `prompts`: with what stands before an answer, after them."""
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
                self._replace_clock()
                texts, blocks = cast(Rendered, render_jinja_template([chat], **values))
        except ChatRefused:
            raise
        except TemplateError as error:
            raise ChatRefused(f"the template says: {shown(str(error), MAX_SAID)}") from error
        except TookTooMuch as error:
            self._num_ended += 1
            if self._num_ended >= MAX_ENDED:
                what = f"{MAX_ENDED} chats took the chat template too much: {error}"
                raise UserInputError(Problem(what=what, where="model.chat_template")) from error
            raise ChatRefused(f"the template takes too much: {error}") from error
        except Exception as error:  # a program of somebody else's may raise anything
            said = f"{type(error).__name__}: {shown(str(error), MAX_SAID)}"
            raise ChatRefused(f"the template fails: {said}") from error
        if ADDRESS in texts[0] and not any(
            ADDRESS in said for said in (self.source, *(turn.content for turn in turns))
        ):
            raise ChatRefused("the template writes an object's address, which differs from run to run")
        return _checked(texts[0]), blocks[0] if marks else []

    def _replace_clock(self) -> None:
        """Put ours among the globals of the compiled template (transformers may have compiled it again)."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(self._dated).environment
        environment.globals.update(strftime_now=self._clock, lipsum=_drawn)
        environment.filters["random"] = _drawn


def _checked(text: str) -> str:
    if len(text) > MAX_RENDERED:
        raise ChatRefused(f"the template writes {len(text):,} letters")
    if has_surrogates(text):
        raise ChatRefused("the template writes half a character (\\ud800 to \\udfff)")
    return text


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
