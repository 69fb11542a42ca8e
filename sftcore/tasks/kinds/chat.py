"""Conversations: all assistant turns are trained, the last reply is graded.

In: turns. Out: what `Content` asks of them.
Invariant: what the system says is no part of the question: the same question after another system text is the
same; special tokens in a turn are refused elsewhere, so they are not looked for here.
Trade-off: each trained answer but the last is one more text that leaks are compared by (16 bytes each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from sftcore.data.ledger import Reason
from sftcore.knowledge.containment import AliasTable
from sftcore.tasks.kinds.content import (
    Content,
    Form,
    Message,
    Pieces,
    Refusal,
    Reply,
    compared,
    joined,
    normalised,
)

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Content):
    """A conversation with at least one assistant turn that is trained."""

    messages: tuple[Message, ...]

    @property
    def answers(self) -> list[int]:
        """Places of the turns that are trained."""
        return [i for i, turn in enumerate(self.messages) if turn.role == "assistant" and turn.is_trained]

    @property
    def is_bare(self) -> bool:
        return False

    @property
    def is_verbatim(self) -> bool:
        return True

    @property
    def has_system(self) -> bool:
        return any(turn.role in SYSTEM_ROLES for turn in self.messages)

    @property
    def num_trained_turns(self) -> int:
        return len(self.answers)

    def turns_said(self) -> tuple[str, ...]:
        return tuple(turn.content for turn in self.messages)

    def asked(self) -> tuple[str, str]:
        text = joined(*_said(self.messages[: self.answers[-1]]))
        return text, text

    def written(self) -> str:
        return joined(*(text for turn in self.messages for text in _written(turn)))

    def earlier(self) -> list[str]:
        turns, answers = self.messages, self.answers[:-1]
        texts = _said(turns[: answers[-1]]) if answers else []
        num_said = [0, *accumulate(turn.role not in SYSTEM_ROLES for turn in turns)]
        return [joined(*texts[: num_said[i]]) for i in answers]

    def plain_texts(self) -> tuple[str, ...]:
        return ()

    def cuttable(self) -> list[str]:
        return [turn.content for turn in self.messages if turn.role != "assistant"]

    def with_cuttable(self, texts: Sequence[str]) -> Chat:
        rest = iter(texts)
        turns = (t if t.role == "assistant" else replace(t, content=next(rest)) for t in self.messages)
        return Chat(messages=tuple(turns))

    def pieces(self, form: Form) -> Pieces | Refusal:
        return form.talk(self.messages)

    def why_no_reply(self) -> Refusal | None:
        if (last := self.messages[-1].role) == "assistant":
            return None
        return Refusal(reason=Reason.NO_REPLY, detail=f"the last turn is of role {last}")

    def graded(self, text: str, reply: Reply | None, *, form: Form, aliases: AliasTable) -> dict[str, Any]:
        return compared(text, reply)


def _said(turns: Sequence[Message]) -> list[str]:
    """What was said, the system's words aside."""
    return [normalised(turn.content) for turn in turns if turn.role not in SYSTEM_ROLES]


def _written(turn: Message) -> tuple[str, str]:
    return (turn.role if turn.is_trained else f"{turn.role}, not trained"), turn.content
