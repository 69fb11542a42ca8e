"""Whether a name that was found in a text is that name, or a word or a part of another name.

In: a text's words, the place of a find. Out: yes or no.
Invariant: a find is judged by the words around it alone, so that a text that goes on changes nothing but for
its last words.
Trade-off: rules on capitals and lists of words, no model: "Paris Hilton" is not Paris, in 10 us, but "In
London Dickens wrote" isn't London. tests/knowledge/containment.tsv measures it.

docs/methods.md M1 counts a completion that contains the answer; decided here is what contains it:
* An answer of everyday words with capitals ("Nice", "Little Rock") needs its capitals: "a nice day".
* Not a part of a longer name in capitals: York in "New York", Paris in "Paris Hilton", Jordan in "Michael
  Jordan", Milan in "AC Milan", Bath in "Bath & Body Works", Toy Story in "Toy Story 2". A family name after
  given names counts (Beethoven in "Ludwig van Beethoven"), a firm or state before what it is ("Toyota Motor
  Corporation", "Sichuan Province"), and so does "Anglo-French" for French.
* A well-known place with another one's state ("Paris, Texas") is not that place; "Houston, Texas" is.
* Everyday words that open a sentence tell nothing: "Reading is fun", but "Reading is a town".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sftcore.fsio import read_json
from sftcore.knowledge.numbers import counts_things
from sftcore.knowledge.spelling import Words, fold

NAMES = Path(__file__).parent.parent / "assets" / "names"
READ_AHEAD = 4  # words after a find that may be looked at
_LINKS = frozenset("a an and at de for in of on or the to".split())
_MARKS = ".,;:!?()[]{}\"'*_"
_ROMAN = re.compile(r"[IVX]+")
_DEMONYM = re.compile(r"\w+(?:an|ans|ish|ese|ic|ch|i|ian)")
_GLUED_MARKS = "+#@^$"  # C++, C#
_SLASHED = re.compile(r"[A-Z]{1,3}/[A-Z]{1,3}")  # AC/DC
_SEQUEL = re.compile(r"[2-9]|[1-9]\d")
_ADJECTIVE = re.compile(r"\w{2,}(?:[ie]an|ed|ern|ish|ese|ing)")
_PASTS = frozenset(
    "sang wrote made won sold began became came took gave led broke left did got played".split()
)
_BEINGS = frozenset("is was were are has had".split())
_VERBS = frozenset(
    "also can could will would may might must should does makes produces offers supports sells owns uses "
    "provides runs plays lies borders remains includes allows comes won".split()
)
_PLACINGS = frozenset("in on near of with".split())
_CONNECTIVES = frozenset("and or for from since until at by before after who which that as but".split())
_DETERMINERS = frozenset("a an the this that his her my each every".split())
_BEFORE_PLACES = ("places", "epochs", "demonyms", "region_words", "months_and_days")
_SHORT_STATE = re.compile(r"[A-Z]{2}")  # "Austin TX"


@cache
def word_lists() -> dict[str, frozenset[str]]:
    """The shipped lists: given names, places, what comes before or after names."""
    found: dict[str, Any] = read_json(NAMES / "lists.json")
    return {key: frozenset(words) for key, words in found.items()}


@cache
def common_words() -> frozenset[str]:
    """Everyday English words that may also be names, in small letters."""
    return frozenset((NAMES / "common_words.txt").read_text(encoding="utf-8").split())


@cache
def words_of_no_name() -> frozenset[str]:
    """Words that are no name's in spite of a capital before a number: function words, months, "Chapter"."""
    lists = word_lists()
    return lists["function_words"] | lists["before_numbers"] | {w.lower() for w in lists["months_and_days"]}


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
    if find.after[:1] and find.after[0] in _GLUED_MARKS:
        return True
    if find.first == find.last and _SLASHED.fullmatch(core(find.text.cased[find.first])):
        return True
    return _goes_on(find, " ".join(name)) or _began_before(find, is_single=len(name) == 1)


def begins_sentence(find: Find) -> bool:
    """Whether a find stands after a full stop or first in the text."""
    return find.first == 0 or find.text.cased[find.first - 1][-1] in ".!?:"


def is_opening(find: Find) -> bool:
    """Whether a find opens a sentence that goes on in small letters, so that its capital tells nothing."""
    words = find.text.cased
    if find.after or find.before or find.last + 1 >= len(words):
        return False
    return begins_sentence(find) and (words[find.last + 1][0].islower() or words[find.last + 1] == "I")


def is_everyday_opening(find: Find) -> bool:
    """Whether everyday words open a sentence as such: "Reading is fun", not "Reading is a town".

    They are a name's before "and", "from", a past tense, "in" and a capital, "is" and a noun.
    """
    if not is_opening(find):
        return False
    later = [core(word) for word in find.text.cased[find.last + 1 : find.last + 3]]
    second = later[1] if len(later) > 1 else ""
    if later[0] in _VERBS or later[0].endswith("ly"):
        return find.word(0).endswith("ing")
    if later[0] in _BEINGS:
        return find.word(0).endswith("ing") and not (
            second in word_lists()["function_words"] or second.endswith("ed") or second[:1].isupper()
        )
    if later[0] in _PLACINGS:
        return not (second[:1].isupper() or second[:1].isdigit())
    is_past = later[0] in _PASTS or len(later[0]) > 4 and later[0].endswith("ed")
    return not (is_past or later[0] in _CONNECTIVES)


def is_shouted(find: Find) -> bool:
    """Whether a find in capitals stands among such words and needn't be an initialism: "TELL US NOW"."""
    words = find.text.cased
    if find.first:
        before = words[find.first - 1]
        return len(before) > 1 and before.isalpha() and before.isupper() and before not in ("THE", "IN")
    later = words[find.last + 1] if find.last + 1 < len(words) else ""
    return later.isupper() and later.lower() in word_lists()["function_words"]


def is_countable(find: Find) -> bool:
    """Whether "rock" or "metal" is a thing, and no kind of music or stuff: "on a rock", but "a rock band"."""
    words = find.text.cased
    if not find.first or words[find.first - 1].lower() not in _DETERMINERS or find.word(0)[:1].isupper():
        return False
    later = words[find.last + 1] if find.last + 1 < len(words) and not find.after else "is"
    return core(later).lower() in word_lists()["function_words"]


def may_go_on(find: Find, *, is_proper: bool) -> bool:
    """Whether words after a find, perhaps unfinished, may make it another name."""
    text, number = find.text, find.last + 1
    later = text.cased[number]
    if any(water.startswith(later.lower()) for water in word_lists()["waters"]):
        return True
    return is_proper and (later[:1].isupper() or later[:1].isdigit() or text.joints[number] in ("&", "-"))


def _goes_on(find: Find, name: str) -> bool:
    """Whether words in capitals after the find make it another name."""
    if find.last + 1 >= len(find.text.cased) or find.after not in ("", ","):
        return False
    later = _words_behind(find)
    if find.after:
        is_listed = find.first > 0 and find.text.cased[find.first - 1][-1] == ","
        return not is_listed and _is_elsewhere(name, later)
    joint = find.text.joints[find.last + 1]
    if joint == "&":
        return len(later) > 1 and _is_of_a_firm(name, core(later[1]))
    if joint == "-":
        return _is_compound(core(find.text.cased[find.last]), core(later[0]))
    return _is_numbered(name, later) or _is_lengthened(name, later)


def _is_lengthened(name: str, later: Sequence[str]) -> bool:
    """Whether the next words are capitals of a longer name, or make a river of a country."""
    lists = word_lists()
    if core(later[0]) in lists["waters"] and name in lists["regions"]:
        return True
    for word in later:
        bare = core(word)
        if not bare[:1].isupper() or word[0] in _MARKS or bare.lower() in lists["function_words"]:
            return False
        if not _keeps_identity(name, bare):
            return True
        if word != bare:
            return False
    return False


def _is_numbered(name: str, later: Sequence[str]) -> bool:
    """Whether a number makes a sequel: "Toy Story 2 was", not "Lima 20 years" or "Rome 2 May"."""
    lists = word_lists()
    if not _SEQUEL.fullmatch(core(later[0])) or name in lists["places"] or name in lists["months_and_days"]:
        return False
    if len(later) == 1 or not later[0][-1].isdigit():
        return True
    bare = core(later[1])
    is_date = bare in lists["months_and_days"]
    return not (is_date or counts_things(bare, no_names=lists["function_words"]))


def _is_elsewhere(name: str, later: Sequence[str]) -> bool:
    """Whether a state after a comma makes a well-known place another one: "Paris, Texas".

    A state that a list goes on from ("Peru, Indiana and Ohio") tells nothing.
    """
    lists, bare = word_lists(), [core(word) for word in later]
    if name not in lists["known_elsewhere"]:
        return False
    num = next((n for n in (2, 1) if n <= len(bare) and " ".join(bare[:n]) in lists["states"]), 0)
    if not num or f"{name}, {' '.join(bare[:num])}" in lists["own_states"]:
        return False
    rest = bare[num:]
    if rest[:1] in (["and"], ["or"]):
        return not (len(rest) > 1 and rest[1][:1].isupper())
    is_listed = later[num - 1][-1] == "," and bool(rest) and rest[0][:1].isupper()
    return not (is_listed and rest[0] not in lists["regions"])


def _is_of_a_firm(name: str, other: str) -> bool:
    """Whether "&" makes one name of two: "Bath & Body Works", not "Germany & France"."""
    places = word_lists()["places"]
    return " " not in name and other[:1].isupper() and not (name in places and other in places)


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
    """Whether a word in capitals after a name leaves it the same: a country, "Province"; of firms, "Inc".

    >>> pairs = ("Toyota Motor", "Singapore Airlines", "Paris France", "Paris Texas")
    >>> [_keeps_identity(*pair.split()) for pair in pairs]
    [True, False, True, False]
    """
    lists = word_lists()
    if word == "City":
        return name == "New York" or not (name in lists["places"] or _is_common(name))
    if word in lists["states"] and name in lists["known_elsewhere"]:
        return f"{name}, {word}" in lists["own_states"]
    if name in lists["demonyms"] and word in lists["regions"]:
        return False
    if word in lists["natural_words"]:
        return name not in lists["places"] and not _is_common(name)
    if word in lists["months_and_days"] or word in lists["region_words"]:
        return True
    if word in lists["firm_words"]:
        return name not in lists["places"]
    is_state = _SHORT_STATE.fullmatch(word) is not None and not _ROMAN.fullmatch(word)
    is_place = word in lists["regions"] or name in lists["regions"] and word in lists["cities"]
    return (is_state or is_place) and not _is_common(name)


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
        return bare.lower() in lists["prefixes"] or _is_compound(bare, own)
    if find.text.joints[find.first - 1] == "&" and find.first > 1 and is_single:
        return words[find.first - 2][:1].isupper() and _is_of_a_firm(own, core(words[find.first - 2]))
    if bare.lower() in lists["modifiers"] and bare[0].isupper() == own[0].isupper():
        is_part = bare.lower() in ("north", "south", "east", "west", "lower", "upper", "inner")
        return not (is_part and own.capitalize() in lists["divided_cities"])
    if f"{bare} {own}" in lists["adjective_modifiers"]:
        return True
    if is_single and _is_behind_a_name(find, bare, own):
        return True
    return _is_of_a_head(words[: find.first])


def _is_behind_a_name(find: Find, bare: str, own: str) -> bool:
    """Whether a word in capitals and a place after it are a name: "Air Canada", "Bayern Munich".

    Not "Visit Paris" (it opens a sentence), "Nazi Germany", "Paris France" or "Long Beach California"; before
    a country an unknown word may be its town ("Lagos Nigeria").
    """
    lists, words = word_lists(), find.text.cased
    if bare in lists["clubs"] and own[:1].isupper():
        return True
    if own not in lists["places"] or not bare[0].isupper() or words[find.first - 1].endswith("'s"):
        return False
    second = words[find.first - 2] if find.first > 1 else "."
    if bare in lists["fronts"] or bare in lists["given_names"]:
        return second.lower() not in lists["modifiers"]
    is_plain = bare.lower() in lists["function_words"] or _ADJECTIVE.fullmatch(bare) or second[-1] in ".!?:"
    if is_plain or (bare.isupper() and own.isupper()) or any(bare in lists[key] for key in _BEFORE_PLACES):
        return False
    if own in lists["cities"]:
        return True
    return bare.lower() in common_words() and not (
        second[:1].isupper() and second.lower() not in lists["function_words"]
    )


def _is_of_a_head(words: Sequence[str]) -> bool:
    """Whether they end in "Gulf of" or "University of the"."""
    head = words[:-1] if words[-1] == "the" else words
    return len(head) > 1 and head[-1] == "of" and core(head[-2]) in word_lists()["heads_of"]
