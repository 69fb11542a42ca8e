"""Which characters of a record's prompt go when a sample is too long.

In: a record's content and a number of characters. Out: the content with that many fewer.
Invariant: answers, assistant turns, template text and the last character of each text stay.
Trade-off: whichever text is longest loses its leftmost character first, since questions tend to stand at the
end of long prompts; the cut may fall within a word (1 token at most).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sftcore.data.contents import Chat, Completion, Content, Fact, Pair
from sftcore.data.records import even_shares


def prompt_texts(content: Content) -> list[str]:
    """The texts that may be cut: a question, both texts of a pair, a prompt, turns not the assistant's."""
    match content:
        case Fact():
            return [content.question or ""]
        case Pair():
            return [content.a, content.b]
        case Completion():
            return [content.prompt]
        case Chat():
            return [turn.content for turn in content.messages if turn.role != "assistant"]


def with_prompt_texts(content: Content, texts: Sequence[str]) -> Content:
    """`content` with other prompt texts."""
    match content:
        case Fact():
            return replace(content, question=texts[0])
        case Pair():
            return replace(content, a=texts[0], b=texts[1])
        case Completion():
            return replace(content, prompt=texts[0])
        case Chat():
            rest = iter(texts)
            turns = content.messages
            return Chat(
                messages=tuple(t if t.role == "assistant" else replace(t, content=next(rest)) for t in turns)
            )


def cut_left(texts: Sequence[str], num_characters: int) -> list[str]:
    """`texts` with `num_characters` fewer in all, each taken from the left of the then longest text.

    >>> cut_left(["abcdef", "xyz"], 4)
    ['def', 'yz']
    """
    lengths = [len(text) for text in texts]
    kept = even_shares(lengths, sum(lengths) - num_characters)
    return [text[len(text) - keep :] for text, keep in zip(texts, kept, strict=True)]
