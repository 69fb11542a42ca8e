"""Special tokens that a text spells out: the tokenizer makes the token of them, not the text.

In: a tokenizer, and texts of records (not of templates, which hold them on purpose). Out: which they are.
Invariant: tokens that the recipe adds itself (`model.add_tokens`) are no finding.
Trade-off: texts are searched, not ids: a batch of 1,024 questions without any token's first character costs
0.5 microseconds a row (2026-11), one with it a pass of a regular expression as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property

from sftcore.data.tokens import Codec
from sftcore.tasks.kinds.chat import Chat
from sftcore.tasks.kinds.content import Content

THOUGHTS = frozenset(["<think>", "</think>"])  # of Qwen3 and DeepSeek-R1: added tokens, not special ones


class SpecialTokens:
    """Finds the special tokens of one tokenizer in texts.

    Args:
        codec: of the tokenizer.
        own: tokens that texts may hold.
        more: tokens that texts may not hold although the tokenizer does not call them special.
    """

    def __init__(self, codec: Codec, own: Collection[str] = (), more: Collection[str] = ()) -> None:
        names = codec.tokenizer.convert_ids_to_tokens(sorted(codec.special_ids))
        self._thoughts = THOUGHTS - set(names)
        self._names = sorted({*names, *more} - set(own), key=len, reverse=True)
        self._first_characters = sorted({name[0] for name in self._names})

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._names)))  # Gemma has 6,000 of them: built when needed

    def find(self, text: str) -> str | None:
        """The first special token that `text` spells out."""
        if not any(character in text for character in self._first_characters):
            return None
        found = self._pattern.search(text)
        return found[0] if found else None

    def rows(self, contents: Sequence[Content]) -> list[int]:
        """Which contents, chats aside, spell one out."""
        texts = ["\n".join(content.plain_texts()) for content in contents]
        if self.find("\n".join(texts)) is None:
            return []
        return [i for i, text in enumerate(texts) if self.find(text) is not None]

    def find_in_chat(self, chat: Chat) -> tuple[str, str] | None:
        """The first special token in a turn of `chat`, with the turn's role."""
        for turn in chat.messages:
            text = turn.content
            if turn.role == "assistant":  # its thoughts are content, of which the tokens are made, too
                for token_of_thought in self._thoughts:
                    text = text.replace(token_of_thought, "\n")
            if (token := self.find(text)) is not None:
                return token, turn.role
        return None
