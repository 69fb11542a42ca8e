"""Which characters of a record's prompt go when a sample is too long.

In: a record's content and a number of characters. Out: the content with that many fewer.
Invariant: answers, assistant turns, template text and the last character of each text stay.
Trade-off: whichever text is longest loses its leftmost character first, since questions tend to stand at the
end of long prompts; the cut may fall within a word (1 token at most).
"""

from __future__ import annotations

from collections.abc import Sequence

from sftcore.data.records import even_shares


def cut_left(texts: Sequence[str], num_characters: int) -> list[str]:
    """`texts` with `num_characters` fewer in all, each taken from the left of the then longest text.

    >>> cut_left(["abcdef", "xyz"], 4)
    ['def', 'yz']
    """
    lengths = [len(text) for text in texts]
    kept = even_shares(lengths, sum(lengths) - num_characters)
    return [text[len(text) - keep :] for text, keep in zip(texts, kept, strict=True)]
