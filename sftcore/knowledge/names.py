"""Whether a name that was found in a text is that name, or a word or a part of another name.

In: a text's words, the place of a find. Out: yes or no.
Invariant: a find is judged by the words around it alone, so that a text that goes on changes nothing but for
its last words.
Trade-off: rules on capitals and lists of words, no model: "Paris Hilton" is told from Paris in 10 us, but
"Nice weather" at a sentence's start is taken for the town. tests/knowledge/containment.tsv measures it.

METHODS.md M1 counts a completion that contains the answer; decided here is what contains it:
* An answer of everyday words with capitals ("Nice", "Little Rock") needs its capitals: "a nice day".
* Not a part of a longer name in capitals: York in "New York", Paris in "Paris Hilton", Jordan in "Michael
  Jordan". A family name behind given names counts (Beethoven in "Ludwig van Beethoven"), a firm or state
  before what it is ("Toyota Motor Corporation", "Sichuan Province"), and so does "Anglo-French" for French.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sftcore.fsio import read_json
from sftcore.knowledge.spelling import Words, fold

NAMES = Path(__file__).parent.parent / "assets" / "names"
READ_AHEAD = 4  # words behind a find that may be looked at
_LINKS = frozenset("a an and at de for in of on or the to".split())
_MARKS = ".,;:!?()[]{}\"'*_"
_ROMAN = re.compile(r"[IVX]+")
_DEMONYM = re.compile(r"\w+(?:an|ans|ish|ese|ic|ch|i|ian)")
_SHORT_STATE = re.compile(r"[A-Z]{2}")  # "Austin TX"


@cache
def word_lists() -> dict[str, frozenset[str]]:
    """The shipped lists: given names, places, what comes before or behind names."""
    found: dict[str, Any] = read_json(NAMES / "lists.json")
    return {key: frozenset(words) for key, words in found.items()}


@cache
def common_words() -> frozenset[str]:
    """Everyday English words that may also be names, in small letters."""
    return frozenset((NAMES / "common_words.txt").read_text(encoding="utf-8").split())


def core(word: str) -> str:
    """The word without marks around it and without a possessive ending.

    >>> core('"Paris,'), core("York's")
    ('Paris', 'York')
    """
    return word.strip(_MARKS).removesuffix("'s")


def words_that_need_capitals(words: Sequence[str]) -> frozenset[int]:
    """Numbers of the words of an answer that have to stand with a capital in a text.

    Those of everyday words alone, unless it is one word for a kind of thing ("Jazz", "Actor").

    >>> [sorted(words_that_need_capitals(text.split())) for text in ("Nice", "Little Rock", "Paris", "jazz")]
    [[0], [0, 1], [], []]
    """
    telling = [n for n, word in enumerate(words) if core(word).lower() not in _LINKS] or [*range(len(words))]
    names_a_kind = len(words) == 1 and core(words[0]).lower() in word_lists()["kinds"]
    is_name = all(_is_common(words[n]) and core(words[n])[:1].isupper() for n in telling)
    long = [n for n in telling if len(core(words[n])) > 1] or telling
    return frozenset(long if is_name and not names_a_kind else ())


def _is_common(word: str) -> bool:
    bare = core(word).lower()
    return len(bare) == 1 or bare in common_words()


@dataclass(frozen=True, slots=True)
class Find:
    """A place in a text where a name's letters stand.

    Args:
        text: the text.
        first, last: numbers of the words that the find begins and ends in.
        before, after: what of these two words is not the find.
    """

    text: Words
    first: int
    last: int
    before: str
    after: str

    @classmethod
    def at(cls, text: Words, start: int, end: int) -> Find:
        """The find at `start` to `end` of `text.folded`."""
        folded = text.folded
        word_start, word_end = folded.rfind(" ", 0, start) + 1, folded.find(" ", end)
        return cls(
            text,
            first=folded.count(" ", 0, start),
            last=folded.count(" ", 0, end),
            before=folded[word_start:start],
            after=folded[end : word_end if word_end >= 0 else len(folded)],
        )

    def word(self, number: int) -> str:
        """The number-th word of the find, as the text has it."""
        word = self.text.cased[self.first + number]
        return word[_unfolded_length(word, self.before) :] if number == 0 else word


def _unfolded_length(word: str, folded_start: str) -> int:
    """Characters of `word` that fold to `folded_start`."""
    if len(fold(word)) == len(word):
        return len(folded_start)
    return next((n for n in range(len(word)) if len(fold(word[:n])) >= len(folded_start)), 0)


def is_part_of_another(find: Find, *, name: Sequence[str]) -> bool:
    """Whether a find of a name in capitals is a part of a longer name that means something else.

    Args:
        name: its words.
    """
    return _goes_on(find, " ".join(name)) or _began_before(find, is_single=len(name) == 1)


def is_opening(find: Find) -> bool:
    """Whether a find opens a sentence that goes on in small letters, so that its capital tells nothing."""
    words = find.text.cased
    if find.after or find.before or find.last + 1 >= len(words):
        return False
    opens = find.first == 0 or words[find.first - 1][-1] in ".!?:"
    return opens and words[find.last + 1][0].islower()


def _goes_on(find: Find, name: str) -> bool:
    """Whether words in capitals behind the find make it another name."""
    if find.after or find.last + 1 >= len(find.text.cased):
        return False
    lists, behind = word_lists(), _words_behind(find)
    if find.text.joints[find.last + 1] == "-":
        return _is_compound(core(find.text.cased[find.last]), core(behind[0]))
    for word in behind:
        bare = core(word)
        if not bare[:1].isupper() or word[0] in _MARKS or bare.lower() in lists["function_words"]:
            return False
        if not _keeps_identity(name, bare):
            return True
        if word != bare:
            return False
    return False


def _words_behind(find: Find) -> list[str]:
    """The next words, the letters of an initialism as one: F C -> FC."""
    first, text = find.last + 1, find.text
    found: list[str] = []
    for number in range(first, min(first + READ_AHEAD, len(text.cased))):
        if found and text.joints[number] == ".":
            found[-1] += text.cased[number]
        else:
            found.append(text.cased[number])
    return found


def _keeps_identity(name: str, word: str) -> bool:
    """Whether a word in capitals behind a name leaves it the same: a country, "Province"; of firms, "Inc".

    >>> [_keeps_identity(*pair.split()) for pair in ("Toyota Motor", "Singapore Airlines", "Paris France")]
    [True, False, True]
    """
    lists = word_lists()
    if word in lists["months_and_days"] or word in lists["region_words"]:
        return True
    if word in lists["firm_words"]:
        return name not in lists["places"]
    is_state = _SHORT_STATE.fullmatch(word) is not None and not _ROMAN.fullmatch(word)
    return (is_state or word in lists["places"]) and not _is_common(name)


def _is_compound(left: str, right: str) -> bool:
    """Whether two words with a hyphen between them are one name: "Winston-Salem", not "Anglo-French"."""
    if left.lower() in word_lists()["after_hyphen"] or right in word_lists()["after_hyphen"]:
        return True
    if not (left[:1].isupper() and right[:1].isupper()):
        return False
    return not (left.endswith("o") or _DEMONYM.fullmatch(left) and _DEMONYM.fullmatch(right))


def _began_before(find: Find, *, is_single: bool) -> bool:
    """Whether the words before the find make it another name."""
    lists, words = word_lists(), find.text.cased
    if find.before.endswith("'"):
        return words[find.first][:1].isupper()  # Connor in "O'Connor", but Oslo in "d'Oslo"
    if find.before or not find.first:
        return False
    previous, own = words[find.first - 1], core(find.word(0))
    bare = core(previous)
    if not bare or not previous[-1].isalnum():
        return False
    if find.text.joints[find.first] == "-":
        return _is_compound(bare, own)
    if bare.lower() in lists["modifiers"] and bare[0].isupper() == own[0].isupper():
        is_part = bare.lower() in ("north", "south", "east", "west", "lower", "upper", "inner")
        return not (is_part and own.capitalize() in lists["divided_cities"])
    if f"{bare} {own}" in lists["adjective_modifiers"]:
        return True
    if is_single and bare in lists["given_names"] and own in lists["places"]:
        return True
    return _is_of_a_head(words[: find.first])


def _is_of_a_head(words: Sequence[str]) -> bool:
    """Whether they end in "Gulf of" or "University of the"."""
    head = words[:-1] if words[-1] == "the" else words
    return len(head) > 1 and head[-1] == "of" and core(head[-2]) in word_lists()["heads_of"]
