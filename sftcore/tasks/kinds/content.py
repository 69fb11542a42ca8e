"""What every kind of record can be asked: one class for what hygiene, prompts, evaluation and selection need.

In: one row's content (a fact, a pair, a completion, a chat). Out: texts and marks of it, by the same methods.
Invariant: no caller asks which kind it has: what differs by kind is a method here, with a default where most
kinds have nothing to say.
Trade-off: a new kind writes five methods (about 40 lines), and nothing else has to know it.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftcore.data.ledger import Reason
from sftcore.knowledge.containment import AliasTable
from sftcore.settings import MatchingSettings
from sftcore.tasks.template import Template

UNKNOWN_LABEL = -1
# Unicode's format characters (Cf) that text is sprinkled with: soft hyphen, zero-width, direction, byte-order
UNSEEN = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)
Pieces = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a record can't become a sample (`reason` is one of `PROMPTING`)."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; an assistant's is trained unless the row says otherwise."""

    role: str
    content: str
    is_trained: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The right reply.

    Args:
        text: without special tokens and white space around it.
        num_tokens: before the stop token.
        stop_id: the token that ends it, which is a template's own in a chat.
    """

    text: str
    num_tokens: int
    stop_id: int


def _no_chats(_: tuple[Message, ...]) -> Pieces | Refusal:
    return Refusal(reason=Reason.REFUSED_BY_TEMPLATE, detail="no chat template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The form into which contents are written.

    Args:
        templates: by language ("zh", "en"); "any" where the language doesn't matter.
        matching: label words, language, examples, rationales.
        patterns: question pattern with {subject} per relation, for facts without a question of their own.
        joins_texts: the model gets both texts as the tokenizer joins two texts, without a prompt.
        talk: turns as the chat template writes them.
    """

    templates: Mapping[str, Template]
    matching: MatchingSettings
    patterns: Mapping[str, str]
    joins_texts: bool = False
    talk: Callable[[tuple[Message, ...]], Pieces | Refusal] = _no_chats


@dataclass(frozen=True, slots=True)
class Content(ABC):
    """What one row says."""

    @property
    def gold(self) -> int:
        """The class of a pair; -1 of others."""
        return UNKNOWN_LABEL

    @property
    def why(self) -> str | None:
        """The reason for the gold label, where the row gives one."""
        return None

    @property
    def is_bare(self) -> bool:
        """Whether prefix and stop token are still to be added; a chat template writes both itself."""
        return True

    @property
    def is_verbatim(self) -> bool:
        """Whether a reply is right only where it is the row's own."""
        return False

    @property
    def has_system(self) -> bool:
        """Whether the system says something in it."""
        return False

    @property
    def num_trained_turns(self) -> int:
        """Turns of a chat that are trained; 1 of what has no turns."""
        return 1

    def with_answers(self, answers: Sequence[str]) -> Content:
        """The same with other answers; only a fact has such."""
        raise AssertionError("facts alone are trained with other answers")

    def turns_said(self) -> tuple[str, ...]:
        """The contents of a chat's turns; nothing of what has no turns."""
        return ()

    @property
    def example_group(self) -> str:
        """Solved examples are drawn from these in turn."""
        return ""

    @abstractmethod
    def asked(self) -> tuple[str, str]:
        """What leaks are compared by, normalised: what is asked, and its other form (often the same)."""

    @abstractmethod
    def written(self) -> str:
        """What a sample would hold: equal texts are exact duplicates of prompt and trained answer."""

    def earlier(self) -> list[str]:
        """What is asked before each trained answer but the last, as `asked` has it."""
        return []

    @abstractmethod
    def plain_texts(self) -> tuple[str, ...]:
        """The texts that are noted if they spell out a special token; none of a kind that refuses them."""

    @abstractmethod
    def cuttable(self) -> list[str]:
        """The texts that may be cut when a sample is too long; never an answer."""

    @abstractmethod
    def with_cuttable(self, texts: Sequence[str]) -> Content:
        """The same with other texts in the places of `cuttable`."""

    def completed(self, form: Form) -> Content:
        """The same with what the form adds before it is cut: a question from the relation's pattern."""
        return self

    @abstractmethod
    def pieces(self, form: Form) -> Pieces | Refusal:
        """All of its text: untrained, trained, untrained, ..., or why it can't be written.

        Where texts are joined, both of them.
        """

    def why_untrained(self, form: Form) -> Refusal | None:
        """Why it can be asked, but not trained on."""
        return None

    def rendered(self, form: Form) -> str | None:
        """The prompt that a held-out record becomes, where a verbatim training prompt may spell it out."""
        return None

    def why_no_reply(self) -> Refusal | None:
        """Why there is nothing that a reply could be compared with."""
        return None

    def why_trivial(self, aliases: AliasTable) -> Reason | None:
        """Why a hit on it would say nothing of what a model remembers."""
        return None

    @abstractmethod
    def graded(self, text: str, reply: Reply | None, *, form: Form, aliases: AliasTable) -> dict[str, Any]:
        """What predictions.jsonl says of a generated text: what was expected, and `correct`.

        Args:
            reply: the right one, of a kind that `is_verbatim`.
            form: of the prompt.
            aliases: other names that count.
        """


def normalised(text: str) -> str:
    r"""`text` as leaks are compared: NFKC, case-folded, runs of white space as one space, nothing unseen.

    >>> normalised("Where is  ＰＡ\u200bＲ\u00adＩＳ?\n")
    'where is paris?'
    """
    if text.isascii():
        return " ".join(text.lower().split())  # the same, at a third of the time
    seen = UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(seen.casefold().split())


def joined(*texts: str) -> str:
    """Texts as one, without a doubt about where each ends."""
    return "\x1f".join(texts)  # the ASCII unit separator: not in any text after normalisation


def compared(text: str, reply: Reply | None) -> dict[str, Any]:
    """`Content.graded` of a kind whose reply has to be the right one, white space around it aside."""
    if reply is None:
        return {}
    return {"label": reply.text, "label_tokens": reply.num_tokens, "correct": text.strip() == reply.text}
