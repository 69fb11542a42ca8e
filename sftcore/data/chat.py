"""A conversation as text through the tokenizer's chat template, and where its trained turns stand in it.

In: messages. Out: the rendered text in pieces, untrained and trained in turn.
Invariant: the rendering is the template's own text with every turn in it, to the last character; a trained
piece starts where inference starts to write and ends with the tokens that close the answer.
Trade-off: a chat is rendered once, and compared with the layout of its roles; one whose answers the template
takes apart (thoughts) is laid out by itself, two renderings an answer (0.1 ms each, SmolLM2's template).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property

from sftcore.data.chat_template import Block, ChatRefused, ChatTemplate
from sftcore.data.contents import Chat, Message
from sftcore.data.layout import THOUGHT, Layout, LayoutMaker, found_places, lost
from sftcore.data.opened_turns import OpenedTurns, kept_turns
from sftcore.data.tokens import Codec
from sftcore.errors import Problem, UserInputError

__all__ = ["ChatRefused", "ChatRenderer", "last_answer_only", "turn_ends", "without_system"]
ANY_DAY = date(2024, 7, 26)
TRIAL = Chat(
    messages=(
        Message(role="user", content="What is the colour of the sky?"),
        Message(role="assistant", content="It is blue."),
        Message(role="user", content="And of grass?"),
        Message(role="assistant", content="That is green."),
    )
)
SYSTEM_ROLES = ("system", "developer")
MOST_TREATED_ALONE = 2  # answers; where more are treated by what they say, all may be


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Args:
        codec: of the tokenizer.
        today: the day that a template may ask for; None: one that asks is refused.

    Raises:
        UserInputError: the tokenizer has no chat template, or a trial conversation's turns can't be verified.
    """

    def __init__(self, codec: Codec, today: date | None = None) -> None:
        self.codec = codec
        self._template = ChatTemplate(codec.tokenizer, today)
        tokens = codec.tokenizer.convert_ids_to_tokens(sorted(codec.special_ids))
        self._special = re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)))
        self._layouts = LayoutMaker(self._template, self._special)
        self._opened = OpenedTurns(self._template, self._layouts)
        try:
            self._trial = self._try()
        except ChatRefused as error:
            raise UserInputError(
                Problem(
                    what=f"this chat template can't be trained on: {error}",
                    where=str(codec.tokenizer.name_or_path),
                    remedy="fix the template ({% generation %} marks assistant turns), give another"
                    " (model.chat_template: NAME or FILE), or use another model",
                )
            ) from error

    def _try(self) -> tuple[str, ...]:
        """The trial's pieces, or its first exchange where only the last answer ends so."""
        try:
            return self.pieces(TRIAL)
        except ChatRefused as error:
            question, answer = TRIAL.messages[:2]
            for said in dict.fromkeys((answer.content, self._opened.opened + answer.content)):
                try:
                    return self.pieces(Chat(messages=(question, replace(answer, content=said))))
                except ChatRefused:
                    continue
            raise error from None

    @property
    def end_of_turn_id(self) -> int:
        """The last token that closes an answer, which need not be the tokenizer's end of text."""
        last = [found[0] for found in self._special.finditer(self._trial[-1])][-1]
        return int(self.codec.tokenizer.convert_tokens_to_ids(last))

    @property
    def last_piece(self) -> str:
        """An answer of the trial with all that is trained with it."""
        return self._trial[-1]

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Plain texts by which the template tells turns apart ("[INST]", "USER:"); in a turn, they forge one.

        They are lines of the template's own text between turns, special tokens aside; a bare word such as
        `user` is none, since the token before it makes it a header.
        """
        try:
            between = self._layouts.by_roles(TRIAL.messages).segments[1:3]
        except ChatRefused:
            return ()
        added = [token.content for token in self.codec.tokenizer.added_tokens_decoder.values()]
        tokens = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True) if t.strip()))
        texts = [text.strip() for segment in between for text in re.split(r"\n", tokens.sub("\n", segment))]
        return tuple(dict.fromkeys(text for text in texts if re.search(r"\w", text) and not text.isalnum()))

    @property
    def own_tokens(self) -> frozenset[str]:
        """The special tokens that the template itself writes."""
        return self._written(self._special)

    @property
    def own_added(self) -> frozenset[str]:
        """The added tokens that the template itself writes, special or not: in a turn, they forge one."""
        names = [token.content for token in self.codec.tokenizer.added_tokens_decoder.values()]
        names = [name for name in names if name.strip()]
        added = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
        )
        return self._written(added)

    def _written(self, pattern: re.Pattern[str]) -> frozenset[str]:
        named = set(pattern.findall(self._template.source))
        return frozenset(named.union(pattern.findall("".join(self._trial))))

    def prompt(self, chat: Chat) -> str:
        """The text that inference feeds to get the last assistant turn, whatever that turn says."""
        last = max(i for i, message in enumerate(chat.messages) if message.role == "assistant")
        return self._template.render(chat.messages[:last], prompts=True)

    def pieces(self, chat: Chat) -> tuple[str, ...]:
        """Text before a trained turn, the turn with what closes it, text before the next, ...

        Raises:
            ChatRefused: the template raised, or the turns can't be verified.
        """
        turns = chat.messages[: chat.answers[-1] + 1]  # what follows is not there yet when that is written
        try:
            return self._verified(turns, chat.answers)
        except ChatRefused as why:
            if not (opened := self._opened.opened) and THOUGHT not in turns[-1].content:
                raise
            try:
                return self._opened.pieces(turns, chat.answers)
            except ChatRefused as other:
                raise other if opened or len(chat.answers) == 1 else why from None

    def _verified(self, turns: Sequence[Message], answers: Sequence[int]) -> tuple[str, ...]:
        """The pieces of a chat whose rendering has every turn and what inference feeds for each answer."""
        turns = kept_turns(turns, self._template.render, untrained=True)
        text = self._template.render(turns)
        layout, places = self._laid_out(text, turns)
        borders = [0]
        for i in answers:
            answer = layout.answers[i]
            if isinstance(answer, str):
                raise ChatRefused(answer)
            if answer is not None:
                borders += [places[i][0] - answer.lead, places[i][1] + answer.close]
        if len(borders) == 1:
            raise ChatRefused("the template marks no turn of this chat as trained")
        pieces = tuple(text[a:b] for a, b in zip(borders, borders[1:], strict=False))
        if not all(pieces):
            raise ChatRefused("an assistant turn has no text before it")
        return pieces

    def _laid_out(self, text: str, turns: Sequence[Message]) -> tuple[Layout, list[Block]]:
        """The layout of a rendering, and where the contents stand in it."""
        contents = [turn.content for turn in turns]
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        plain = layout = self._layouts.by_roles(turns)
        treated: set[int] = set()
        while len(places := found_places(text, layout, contents)) < len(turns):
            odd = next((i for i in answers if i >= len(places) and i not in treated), None)
            if odd is None or len(places) in treated:
                raise ChatRefused(lost(len(places), turns[len(places)].role))
            treated.update([odd] if len(treated) < MOST_TREATED_ALONE else answers)
            layout = self._layouts.by_contents(turns, plain, treated)
        return layout, places


def turn_ends(codec: Codec) -> tuple[int, int]:
    """The token that closes an answer, and the last that is trained, on whatever day.

    They differ where the template marks white space after the end of a turn as trained.

    Raises:
        UserInputError: no template that can be trained on.
    """
    renderer = ChatRenderer(codec, ANY_DAY)
    return renderer.end_of_turn_id, codec.encode([renderer.last_piece])[0][-1]


def last_answer_only(chat: Chat) -> Chat:
    """`chat` with only the last of its trained answers trained."""
    last = chat.answers[-1]
    turns = [replace(t, is_trained=t.is_trained and i >= last) for i, t in enumerate(chat.messages)]
    return Chat(messages=tuple(turns))


def without_system(chat: Chat, how: str) -> Chat:
    """`chat` with no turn of the system's.

    Args:
        how: "merge" puts their texts before the next user turn's, with a blank line; "drop" leaves them out.

    Raises:
        ChatRefused: no user turn follows that they could go into.
    """
    turns: list[Message] = []
    waiting: list[str] = []
    for turn in chat.messages:
        if turn.role in SYSTEM_ROLES:
            waiting.append(turn.content)
        elif turn.role == "user" and waiting and how == "merge":
            turns.append(Message(role="user", content="\n\n".join([*waiting, turn.content])))
            waiting = []
        else:
            turns.append(turn)
    if waiting and how == "merge":
        raise ChatRefused("no user turn follows a system turn, into which it could be merged")
    return Chat(messages=tuple(turns))
