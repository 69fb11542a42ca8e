"""A conversation as text through the tokenizer's chat template, and where its assistant turns stand in it.

In: messages. Out: the rendered text in pieces, untrained and trained in turn.
Invariant: each trained piece starts exactly where inference starts to write (the template's rendering of the
turns before, with its generation prompt, is a true prefix of the whole) and ends with the end-of-turn token.
Trade-off: a conversation is rendered once more per assistant turn to verify this (0.1 ms each, SmolLM2's
template); a template that can't be verified is refused rather than trained askew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sftcore.data.contents import Chat, Message
from sftcore.data.tokens import Codec
from sftcore.errors import Problem, UserInputError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK, DAY = "strftime_now", "26 Jul 2024"  # Llama 3's templates take a day that they are given
TRIAL = Chat(
    messages=(
        Message(role="user", content="What is the colour of the sky?"),
        Message(role="assistant", content="It is blue."),
        Message(role="user", content="And of grass?"),
        Message(role="assistant", content="That is green."),
    )
)


class ChatRefused(Exception):
    """A conversation that the template refuses, or whose assistant turns can't be found in its rendering."""


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Raises:
        UserInputError: the tokenizer has no chat template, or a trial conversation's turns can't be verified.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec, self.tokenizer = codec, codec.tokenizer
        name = str(self.tokenizer.name_or_path)
        if not self.tokenizer.chat_template:
            remedy = "use an instruct model, or give `prompt` and `completion` instead of `messages`"
            raise UserInputError(
                Problem(
                    what="the tokenizer has no chat template", where="model.path", got=name, remedy=remedy
                )
            )
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(codec.special_ids))
        self._special = re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)))
        template = str(self.tokenizer.chat_template)
        self._has_masks = bool(GENERATION_TAG.search(template))
        try:
            if CLOCK in template and "date_string" not in template:
                raise ChatRefused(f"it reads the clock ({CLOCK}), so samples would depend on the day")
            self.pieces(TRIAL)
        except ChatRefused as error:
            raise UserInputError(
                Problem(
                    what=f"this chat template can't be trained on: {error}",
                    where=name,
                    remedy="mend the template ({% generation %} marks assistant turns), or use another model",
                )
            ) from error

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an assistant's turn, which need not be the tokenizer's end of text."""
        return self.codec.encode([self.pieces(TRIAL)[-1]])[0][-1]

    def prompt(self, chat: Chat) -> str:
        """The text that inference feeds to get the last assistant turn."""
        last = max(i for i, message in enumerate(chat.messages) if message.role == "assistant")
        return self._render(chat.messages[:last], add_generation_prompt=True)

    def pieces(self, chat: Chat) -> tuple[str, ...]:
        """Text before a turn, the turn with its end-of-turn token, text before the next, ...

        Raises:
            ChatRefused: the template raised, or the turns can't be verified.
        """
        text = self._render(chat.messages)
        turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        starts = [self._verified_start(text, chat.messages[:i]) for i in turns]
        if self._has_masks:
            ends = self._masked_ends(chat, text, starts)
        else:
            contents = [chat.messages[i].content for i in turns]
            ends = [self._content_end(text, start, c) for start, c in zip(starts, contents, strict=True)]
        ends = [self._end_of_turn(text, end) for end in ends]
        borders = [0, *(border for pair in zip(starts, ends, strict=True) for border in pair)]
        pieces = tuple(text[a:b] for a, b in zip(borders, borders[1:], strict=False))
        if not all(pieces):
            raise ChatRefused("an assistant turn has no text before it")
        return pieces

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DAY
            )
        except TemplateError as error:
            raise ChatRefused(f"the template says: {error}") from error
        return text

    def _verified_start(self, text: str, before: Sequence[Message]) -> int:
        prompt = self._render(before, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise ChatRefused("what inference would feed is not a prefix of the whole conversation")
        return len(prompt)

    def _content_end(self, text: str, start: int, content: str) -> int:
        """End of the first copy of `content` after `start` that an end-of-turn token follows."""
        content = content.strip()
        position = text.find(content, start)
        while position >= 0 and not self._special.search(text, start, position):
            end = position + len(content)
            if self._special.match(text, _skip_space(text, end)):
                return end
            position = text.find(content, position + 1)
        raise ChatRefused("an assistant turn, followed by an end-of-turn token, is not in the rendered text")

    def _masked_ends(self, chat: Chat, text: str, starts: list[int]) -> list[int]:
        """Ends of the {% generation %} blocks, which must start where inference starts."""
        rendered: dict[str, Any] = self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in chat.messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            date_string=DAY,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        mask, offsets = [0, *rendered["assistant_masks"], 0], rendered["offset_mapping"]
        first = [i for i in range(len(offsets)) if mask[i + 1] and not mask[i]]
        last = [i for i in range(len(offsets)) if mask[i + 1] and not mask[i + 2]]
        # offsets leave out a token's leading space
        if [_skip_space(text, offsets[i][0]) for i in first] != [_skip_space(text, i) for i in starts]:
            raise ChatRefused("the {% generation %} blocks don't start where the generation prompt ends")
        return [int(offsets[i][1]) for i in last]

    def _end_of_turn(self, text: str, end: int) -> int:
        """`end`, moved behind the end-of-turn token that has to stand there, or stands just before it."""
        ends_already = any(
            found.end() == end for found in self._special.finditer(text, max(0, end - 64), end)
        )
        if ends_already:
            return end
        found = self._special.match(text, _skip_space(text, end))
        if found is None:
            raise ChatRefused("no end-of-turn token follows an assistant turn")
        return found.end()


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
