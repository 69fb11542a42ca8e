"""Answers whose beginning the generation prompt writes itself, or whose thoughts the template leaves out.

In: turns, a template. Out: text before an answer and the answer with what closes it, in turn.
Invariant: each answer follows exactly what inference feeds at its place (a generation prompt that opens a
thought included), and goes on to the row's own last character; an earlier one is trained only where what
inference feeds for the next begins with it as it was trained.
Trade-off: each answer is taken as the last of its chat, so n answers cost 3 n renderings (0.1 ms each).

    template     <|assistant|>\\n<think>\\n                                   the generation prompt
    row                         <think>\\nIt is 4.\\n</think>\\n\\nFour.
    untrained    <|assistant|>\\n<think>\\n
    trained                                It is 4.\\n</think>\\n\\nFour.<|end|>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from sftcore.data.chat_template import ChatRefused, ChatTemplate
from sftcore.data.contents import Message
from sftcore.data.layout import EARLIER, THOUGHT, LayoutMaker, forms, found_places, lost, mark
from sftcore.data.ledger import printable

MAX_SHOWN = 60


class OpenedTurns:
    """Takes each answer as the last of its chat.

    Args:
        template: renders.
        layouts: of the same template.
    """

    def __init__(self, template: ChatTemplate, layouts: LayoutMaker) -> None:
        self._template, self._layouts = template, layouts

    @cached_property
    def opened(self) -> str:
        """What a generation prompt writes after the header that an answer of history has: `<think>`, say."""
        user, answer = mark(0, "user").turn, mark(1, "assistant").turn
        try:
            history = self._template.render([user, answer, mark(2, "user").turn])
            prompt = self._template.render([user], prompts=True)
        except ChatRefused:
            return ""
        header = history.partition(answer.content)[0]
        found = prompt.removeprefix(header) if prompt.startswith(header) else ""
        return found if found.strip() else ""

    def pieces(self, turns: Sequence[Message], answers: Sequence[int]) -> tuple[str, ...]:
        """Text before an answer, the answer with what closes it, text before the next, ...

        Raises:
            ChatRefused: one can't be trained at its place.
        """
        if self._template.has_blocks:
            raise ChatRefused("the {% generation %} blocks don't start where the generation prompt ends")
        pieces: list[str] = []
        before = ""
        for n, i in enumerate(answers):
            prompt, answer = self._as_last(turns[: i + 1], "" if i == answers[-1] else EARLIER)
            if not prompt.startswith(before):
                raise ChatRefused(
                    f"turn {answers[n - 1] + 1} is written otherwise once it is history{EARLIER}"
                )
            pieces += [prompt[len(before) :], answer]
            before = prompt + answer
        return tuple(pieces)

    def _as_last(self, turns: Sequence[Message], hint: str) -> tuple[str, str]:
        """What inference feeds for the last turn, and what it has to write; `hint`: of an earlier turn."""
        *context, last = turns
        prompt = self._prompt(context)
        lead, tail, close = self._layouts.around_last([turn.role for turn in turns])
        whole = self._template.render(turns)
        goes_on = last.content.startswith(self.opened)
        rest, lead = (last.content[len(self.opened) :], "") if goes_on else (last.content, lead)
        for form in forms(rest):
            if form.strip() and whole == prompt + lead + form + tail:
                return prompt, lead + form + tail[:close]
        if not goes_on:
            raise ChatRefused(
                f"the generation prompt opens turn {len(turns)} with {self.opened!r}, and this answer begins"
                " otherwise: begin it so, or choose a template that opens nothing (model.chat_template)"
                f"{hint}"
            )
        if any(whole == self._template.render([*context, said]) for said in _without_thought(last)):
            return prompt, rest + tail[
                :close
            ]  # no rendering of an answer has its thought; inference writes it
        written = printable(whole[len(prompt) :], MAX_SHOWN) if whole.startswith(prompt) else "nothing of it"
        raise ChatRefused(f"{lost(len(context), last.role)}: the template writes {written}{hint}")

    def _prompt(self, context: Sequence[Message]) -> str:
        """What inference feeds after some turns, each of which has to be in it."""

        def fed(turns: Sequence[Message]) -> str:
            return self._template.render(turns, prompts=True)

        prompt = fed(context)
        turns = kept_turns(context, fed)
        layout = self._layouts.of_prompt([turn.role for turn in context])
        places = found_places(prompt, layout, [turn.content for turn in turns])
        if len(places) < len(turns):
            raise ChatRefused(lost(len(places), turns[len(places)].role))
        return prompt


def kept_turns(
    turns: Sequence[Message], render: Callable[[Sequence[Message]], str], *, untrained: bool = False
) -> list[Message]:
    """`turns` without the thoughts that a template leaves out: the rendering is the same without them.

    Args:
        untrained: only turns that aren't trained are looked at.
    """
    kept = list(turns)
    text = None
    for i, turn in enumerate(turns):
        if turn.role != "assistant" or (untrained and turn.is_trained):
            continue
        for said in _without_thought(turn):
            text = render(turns) if text is None else text
            if render(tried := [*kept[:i], said, *kept[i + 1 :]]) == text:
                kept = tried
                break
    return kept


def _without_thought(turn: Message) -> list[Message]:
    """A turn with what follows its thought, as templates write that; none without a thought and more."""
    _, found, said = turn.content.rpartition(THOUGHT)
    if not found or not said.strip():
        return []
    return [replace(turn, content=form) for form in dict.fromkeys((said, said.lstrip("\n"), said.strip()))]
