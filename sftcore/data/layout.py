"""Where the turns of a chat stand in a template's rendering, known by the template's own text between them.

In: a template, turns. Out: a `Layout`: the template's own texts, one more than there are turns, and what of
them belongs to each answer.
Invariant: an answer's piece starts where inference starts to write (the rendering of the turns before, with
its generation prompt, is a true prefix) and ends with the tokens that close it, never with another turn's
header; each turn is found.
Trade-off: marks stand for the contents, so chats of the same roles share a layout. Of a long chat the first 8
and the last 2 answers are verified by renderings of their own (3 each); one in between counts as verified
where the template's text around it is that of a verified one: 200 exchanges cost 20 ms instead of 1 s.

    <|im_start|>user\\n|0|<|im_end|>\\n<|im_start|>assistant\\n|1|<|im_end|>\\n        | | a content
    segments[0]          segments[1]                             segments[2]
                                              lead = "" ^       ^ close = "<|im_end|>"
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile

from sftcore.data.chat_template import Block, ChatRefused, ChatTemplate
from sftcore.data.contents import Message

KEPT_LAYOUTS = 256  # 40 kB each at 200 exchanges
VERIFIED_FIRST, VERIFIED_LAST = 8, 2  # answers
THOUGHT = "</think>"
EARLIER = "; train the last answer alone (data.train_answers: last, or `loss: false` in earlier turns)"
DROPS = f": the template drops thoughts of earlier turns, or writes them otherwise{EARLIER}"
MARK = re.compile(r"Xq(\d+)qX")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a template writes around an assistant's content that is trained with it.

    Args:
        lead: characters before it.
        close: characters after it, up to the last token that closes it.
        most: characters after it that are its own wherever it stands, white space included.
    """

    lead: int
    close: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The template's own text of a chat.

    Args:
        segments: before, between and after the contents.
        answers: of each turn; None where it is none, or is not marked; a text: why it can't be trained.
    """

    segments: tuple[str, ...]
    answers: tuple[Answer | str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A turn as it is rendered, and how it is found again.

    Args:
        turn: rendered.
        is_mark: its content is a mark, which is nowhere else; else it stands where an answer starts.
        lead: what the template may write between the generation prompt and such a content.
    """

    turn: Message
    is_mark: bool = True
    lead: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendering:
    """Slots, their text, and (start, end) of each content in it."""

    slots: Sequence[Slot]
    text: str
    places: Sequence[Block]

    def around(self, i: int) -> tuple[str, str]:
        """The template's own text before content `i` and after it."""
        start = self.places[i - 1][1] if i else 0
        end = self.places[i + 1][0] if i + 1 < len(self.places) else len(self.text)
        return self.text[start : self.places[i][0]], self.text[self.places[i][1] : end]


class LayoutMaker:
    """Makes layouts, and keeps those of chats with the same roles.

    Args:
        template: renders.
        special: finds the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, special: re.Pattern[str]) -> None:
        self._template, self._special = template, special
        self._kept: dict[tuple[str, ...], Layout] = {}

    def by_roles(self, turns: Sequence[Message]) -> Layout:
        """The layout of chats with these roles, whatever they say."""
        roles = tuple(turn.role for turn in turns)
        if roles not in self._kept:
            made = self._made([mark(i, role) for i, role in enumerate(roles)])
            if len(self._kept) >= KEPT_LAYOUTS:
                self._kept.clear()
            self._kept[roles] = made
        return self._kept[roles]

    def around_last(self, roles: Sequence[str]) -> tuple[str, str, int]:
        """What stands around a last answer: after its generation prompt, after itself, and what closes it.

        Returns:
            text before the answer that the generation prompt has not ("" where it has more), text after the
            answer, and how many characters of that belong to it.
        """
        i = len(roles) - 1
        turns = [mark(n, role).turn for n, role in enumerate(roles)]
        prompt = self._template.render(turns[:-1], prompts=True)
        before, _, tail = self._template.render(turns).partition(turns[i].content)
        later = mark(i + 1, "user").turn
        history = self._template.render([*turns, later]).partition(turns[i].content)[2]
        close = self._closing("", tail, history.partition(later.content)[0]).close
        return before.removeprefix(prompt) if before.startswith(prompt) else "", tail, close

    def of_prompt(self, roles: Sequence[str]) -> Layout:
        """The template's own text of turns with these roles and the generation prompt after them.

        Raises:
            ChatRefused: a turn is not in it, or not once, or not in its order.
        """
        slots = [mark(i, role) for i, role in enumerate(roles)]
        text = self._template.render([slot.turn for slot in slots], prompts=True)
        places = self._placed(slots, text).places
        return Layout(segments=_between(text, places), answers=())

    def by_contents(self, turns: Sequence[Message], plain: Layout, treated: Container[int]) -> Layout:
        """The layout of one chat some of whose answers the template treats by what they say (thoughts, say).

        Args:
            plain: of its roles.
            treated: places of these answers.
        """
        slots = [
            Slot(turn=turn, is_mark=False, lead=plain.segments[i]) if i in treated else mark(i, turn.role)
            for i, turn in enumerate(turns)
        ]
        return self._made(slots, plain)

    def _made(self, slots: Sequence[Slot], plain: Layout | None = None) -> Layout:
        text, blocks = self._template.render_blocks([slot.turn for slot in slots])
        whole = self._placed(slots, text)
        places = [i for i, slot in enumerate(slots) if slot.turn.role == "assistant"]
        must = {*places[:VERIFIED_FIRST], *places[-VERIFIED_LAST:]}
        known: dict[tuple[str, ...], Answer | str] = {}
        answers: list[Answer | str | None] = [None] * len(slots)
        for i in places:
            key = (*whole.around(i), *(slot.turn.role for slot in slots[i - 1 : i + 2]))
            if i in must or key not in known:
                known[key] = self._judged(whole, i, plain)
            answers[i] = known[key]
        if self._template.has_blocks:
            answers = [_by_blocks(answer, i, whole, blocks) for i, answer in enumerate(answers)]
        return Layout(segments=_between(text, whole.places), answers=tuple(answers))

    def _header(self, slots: Sequence[Slot], i: int, text: str) -> int:
        """Where inference would start to write turn `i`."""
        prompt = self._template.render([slot.turn for slot in slots[:i]], prompts=True)
        if not text.startswith(prompt):
            what = "what inference would feed is not a prefix of the whole conversation"
            raise ChatRefused(what if i + 1 == len(slots) else f"{what} at turn {i + 1}{EARLIER}")
        return len(prompt)

    def _placed(self, slots: Sequence[Slot], text: str) -> _Rendering:
        """Where each content stands in a rendering.

        Raises:
            ChatRefused: one is not there, or not once, or not in its order.
        """
        found = MARK.finditer(text)
        places: list[Block] = []
        for i, slot in enumerate(slots):
            if slot.is_mark:
                match = next(found, None)
                if match is None or int(match[1]) != i:
                    raise ChatRefused(lost(i, slot.turn.role))
                place = match.span()
            else:
                place = _pinned_place(text, slot, self._header(slots, i, text), i)
            if places and place[0] < places[-1][1]:
                raise ChatRefused(lost(i, slot.turn.role))
            places.append(place)
        if next(found, None) is not None:
            raise ChatRefused("the template writes a turn twice")
        return _Rendering(slots=slots, text=text, places=places)

    def _judged(self, whole: _Rendering, i: int, plain: Layout | None) -> Answer | str:
        """What belongs to turn `i`, or why it can't be trained."""
        try:
            return self._verified(whole, i, plain)
        except ChatRefused as why:
            return str(why)

    def _verified(self, whole: _Rendering, i: int, plain: Layout | None) -> Answer:
        """What belongs to turn `i`: compares it as the last turn with itself before a user's."""
        slots = whole.slots
        header = self._header(slots, i, whole.text)
        if not (whole.places[i - 1][1] if i else 0) <= header <= whole.places[i][0]:
            raise ChatRefused(f"turn {i + 1} does not start where the generation prompt ends")
        start = whole.places[i][0]
        here = whole.text[header:start], whole.around(i)[1]
        is_last = i + 1 == len(slots)
        as_last = here if is_last else self._elsewhere(slots[: i + 1], i)
        as_history = self._elsewhere([*slots, mark(i + 1, "user")], i) if is_last else here
        if as_last is None:
            raise ChatRefused(f"turn {i + 1} is written otherwise when it is the last{EARLIER}")
        if as_history is None:
            known = plain.answers[i] if plain else None
            if isinstance(known, Answer):
                return replace(known, lead=len(here[0]))
            return self._closing(here[0], as_last[1], None)
        if not as_last[0].endswith(as_history[0]):
            raise ChatRefused(f"turn {i + 1} begins otherwise once it is history{EARLIER}")
        # what only the last answer has before it (an empty thought) is context
        return self._closing(as_history[0], as_last[1], as_history[1], is_history=not is_last)

    def _elsewhere(self, slots: Sequence[Slot], i: int) -> tuple[str, str] | None:
        """The template's text before turn `i` (from its header on) and after it elsewhere, or None."""
        try:
            text = self._template.render([slot.turn for slot in slots])
            header = self._header(slots, i, text)
            found = self._placed(slots, text)
        except ChatRefused:
            return None
        return text[header : found.places[i][0]], found.around(i)[1]

    def _closing(
        self, lead: str, as_last: str, as_history: str | None, *, is_history: bool = False
    ) -> Answer:
        """The special tokens after an answer that close it: those that follow wherever it stands."""
        last = self._tokens(as_last)
        other = last if as_history is None else self._tokens(as_history)
        common = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(last, other, strict=False))]
        is_own = common == last and as_history is not None
        if not any(map(self._special.fullmatch, common)) and not is_history:
            common = last  # a token of its own ends the conversation
        specials = [n for n, token in enumerate(common) if self._special.fullmatch(token)]
        if not specials:
            has_end = any(map(self._special.fullmatch, last))
            what = f"an answer ends with another token once it is history{EARLIER}"
            raise ChatRefused(what if has_end else "no end-of-turn token follows an assistant turn")
        # a token that opens turns closes one only where the turn's own text ends with it
        ends = [*takewhile(lambda n: common[n] != self._opener or common == last, specials)]
        if not ends:
            raise ChatRefused("no end-of-turn token follows an assistant turn, but another turn's header")
        close = len("".join(common[: ends[-1] + 1]))
        return Answer(lead=len(lead), close=close, most=len(as_last) if is_own else close)

    @cached_property
    def _opener(self) -> str | None:
        """The special token that opens a turn, where the first turn shows one (the text's start aside)."""
        turn = mark(0, "user").turn
        first = self._template.render([turn]).partition(turn.content)[0]
        both = self._template.render([turn], prompts=True)
        return next(
            (t for t in self._tokens(first) if self._special.fullmatch(t) and both.count(t) > 1), None
        )

    def _tokens(self, text: str) -> list[str]:
        """Special tokens and what lies between them."""
        borders = [0, *(b for found in self._special.finditer(text) for b in found.span()), len(text)]
        return [text[a:b] for a, b in pairwise(borders) if a < b]


def _between(text: str, places: Sequence[Block]) -> tuple[str, ...]:
    """What stands before, between and after some places."""
    borders = [0, *(border for place in places for border in place), len(text)]
    return tuple(text[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True))


def mark(i: int, role: str) -> Slot:
    """A turn whose content is the mark of place `i`."""
    return Slot(turn=Message(role=role, content=f"Xq{i}qX"))


def _pinned_place(text: str, slot: Slot, header: int, i: int) -> Block:
    """Where an answer stands: right after its header, or after what the template writes there."""
    for n in (len(slot.lead), *range(len(slot.lead))):
        lead = slot.lead[n:]
        if not text.startswith(lead, header):
            continue
        start = header + len(lead)
        if form := next((f for f in forms(slot.turn.content) if f and text.startswith(f, start)), None):
            return start, start + len(form)
    raise ChatRefused(lost(i, slot.turn.role) + (DROPS if THOUGHT in slot.turn.content else ""))


def lost(i: int, role: str) -> str:
    """What is said of a turn that is not where it should be."""
    return f"turn {i + 1}, of role {role}, is not in the rendered text as the row has it"


def forms(content: str) -> dict[str, None]:
    """How a template may write a content: as it is, without white space around it, or as JSON."""
    stripped = [content, content.strip(), content.lstrip(), content.rstrip()]
    lines = [content.strip("\n"), content.lstrip("\n"), content.rstrip("\n")]
    escaped = [json.dumps(content, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]
    return dict.fromkeys([*stripped, *lines, *escaped])


def found_places(text: str, layout: Layout, contents: Sequence[str]) -> list[Block]:
    """Where the contents stand in a rendering that holds them and the layout's segments, and nothing else.

    Returns:
        (start, end) of each; fewer than there are contents if the rendering is another from there on.
    """
    places: list[Block] = []
    if not text.startswith(layout.segments[0]):
        return places
    start = len(layout.segments[0])
    for content, later in zip(contents, layout.segments[1:], strict=True):
        tried = (content,) if text.startswith(later, start + len(content)) else forms(content)
        end = next(
            (
                start + len(form)
                for form in tried
                if text.startswith(form, start) and text.startswith(later, start + len(form))
            ),
            None,
        )
        if end is None:
            return places
        places.append((start, end))
        start = end + len(later)
    return places if start == len(text) else places[:-1]


def _by_blocks(
    answer: Answer | str | None, i: int, whole: _Rendering, blocks: Sequence[Block]
) -> Answer | str | None:
    """`answer` as the template's {% generation %} blocks have it; None: it is in none."""
    start, end = whole.places[i]
    block = next((b for b in blocks if b[0] < end and start < b[1]), None)
    if block is None or isinstance(answer, str):
        return answer if block else None
    if answer is None:
        raise ChatRefused(f"a {{% generation %}} block marks turn {i + 1}, which is no assistant's")
    if _skip_space(whole.text, block[0]) > _skip_space(whole.text, start - answer.lead):
        raise ChatRefused("the {% generation %} blocks don't start where the generation prompt ends")
    if block[1] < end:
        raise ChatRefused("a {% generation %} block ends within an answer")
    is_wider = answer.close < block[1] - end <= answer.most
    return replace(answer, close=block[1] - end) if is_wider else answer


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
