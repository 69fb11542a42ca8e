"""Whether a text holds an answer: the one rule that the probe and the scoring share.

In: a model's text, a fact's gold answers, the alias table. Out: yes or no.
Invariant: one more gold answer never turns a yes into a no.
Trade-off: names are sought with `str.find` and what is around them looked at only where they were found. A
text of 150 characters takes 2 us where no name's longest word stands in it, else 60 us for spelling it out
(two-core machine next to other work, December 2026).

docs/methods.md M1 leaves containment open; decided here, in spelling.py, names.py and numbers.py:
* Texts and names are compared after NFKC, case folding and one kind of quote, dash, space and middle dot
  (列奥纳多・达・芬奇); a hyphen is a space, "St." is "Saint", J. R. R. is J.R.R. and JRR; a leading "The" or
  the accents of Latin letters may be missing.
* A name counts only as whole words in scripts that put spaces between words. Chinese, Japanese, Thai, Lao,
  Khmer and Burmese don't: plain substring there. Korean does, but glues particles to the end of a noun, so a
  name needs a word border before it and none before a following Hangul syllable.
* The full stop that ends a name is optional: "Canon Inc." is found in "made by Canon Inc in Japan".
* A name in capitals that folds to an everyday word ("US", "MIT") must stand in capitals in the text; one of
  everyday words with capitals ("Nice") must have its capitals, and a part of another name doesn't count.
* An alias may have near misses: "America" doesn't count inside "South America".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.aliases import ALIASES_PATH as ALIASES_PATH
from sftcore.knowledge.aliases import HEADER as HEADER
from sftcore.knowledge.aliases import AliasRow as AliasRow
from sftcore.knowledge.aliases import AliasTable as AliasTable
from sftcore.knowledge.dates import date_pattern
from sftcore.knowledge.names import (
    READ_AHEAD,
    Find,
    begins_sentence,
    common_words,
    core,
    is_countable,
    is_everyday_opening,
    is_opening,
    is_part_of_another,
    is_shouted,
    may_go_on,
    word_lists,
    words_of_no_name,
    words_that_need_capitals,
)
from sftcore.knowledge.numbers import SETTLED_AFTER, is_of_a_name, number_pattern
from sftcore.knowledge.spelling import (
    WRITTEN_OUT,
    Spelling,
    Words,
    fold,
    spellings_of,
    tidy,
    versions_of,
    words_of,
)
from sftcore.knowledge.spelling import normalise as normalise

FINAL_MARKS = ".!?"
UNIVERSITY = "大学"  # 牛津大学 is no more Oxford than the University of Oxford is
UNDECODED = "\ufffd"  # what a tokenizer puts for bytes that don't make a character yet
INITIALISM_LETTERS = 4  # of an everyday word in capitals that is none ("WHO", "US"); longer ones are shouted

_UNSPACED = (
    re.compile(  # Thai and Lao; Burmese; Khmer; radicals, kana, bopomofo, Han; kana and Han past 16 bits
        "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u3130\u3190-\u9fff\uf900-\ufaff"
        "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
    )
)
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318f\ua960-\ua97f\uac00-\ud7ff]")


def is_unspaced(char: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return _UNSPACED.match(char) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Name:
    """One spelling to look for.

    Args:
        text: as in `Words.folded`; without a final full stop.
        key: a part of it that stands in any text that holds it, as the text has it; perhaps empty.
        dotted: a full stop was cut off its end.
        vetoes: (phrase, offset of `text` in it): a find with the phrase around it doesn't count.
        spelling: whose words these are.
        capitals: numbers of its words that must begin with a capital.
        is_proper: it is written with a capital, so that it may be a part of a longer name.
        is_function_word: it is one of those that open sentences ("It", "Who").
        is_everyday: everyday words that no country has for its name ("Reading").
        is_of_a_kind: a kind of music or stuff that may be a thing, too ("rock").
    """

    text: str
    key: str
    dotted: bool
    vetoes: tuple[tuple[str, int], ...]
    spelling: Spelling
    capitals: frozenset[int]
    is_proper: bool
    is_function_word: bool
    is_everyday: bool
    is_of_a_kind: bool

    def occurs_in(self, text: Words, *, settled: bool, anywhere: bool) -> bool:
        """Whether the name stands in `text`, as words and outside other names.

        Args:
            text: what is searched.
            settled: count only finds that no continuation of `text` could undo.
            anywhere: parts of other names count, too.
        """
        for start in word_finds(text.folded, self.text):
            end = start + len(self.text)
            find = Find.at(text, start, end)
            is_hit = anywhere or self._is_meant(find, start)
            if is_hit and (not settled or self._is_settled(find, end)):
                return True
        return False

    def _is_meant(self, find: Find, start: int) -> bool:
        """Whether a find has the capitals of the name and is not a part of something else."""
        if any(not core(find.word(n))[:1].isupper() for n in self.capitals):
            return False
        if not self._has_initials(find):
            return False
        folded = find.text.folded
        if any(start >= at and folded.startswith(phrase, start - at) for phrase, at in self.vetoes):
            return False
        if self.is_function_word and is_opening(find):
            return False
        if self.is_everyday and is_everyday_opening(find):
            return False
        if self.is_of_a_kind and is_countable(find):
            return False
        return not (self.is_proper and is_part_of_another(find, name=self.spelling.words))

    def _has_initials(self, find: Find) -> bool:
        """Whether initialisms are in capitals or have full stops, and none goes on ("U.S." in "U.S.S.R.")."""
        text, spelling = find.text, self.spelling
        for number in spelling.glued:
            word = spelling.words[number]
            if not find.word(number)[: len(word)].isupper():
                return False
            if word.lower() in common_words() and is_shouted(find):
                return False
        for number in spelling.initials:
            is_dotted = "." in text.joints[find.first + number : find.first + number + 2]
            if not (is_dotted or find.word(number)[:1].isupper()):
                return False
        ends = (find.first, find.last + 1) if spelling.initials else ()
        return not any(text.joints[n : n + 1] == (".",) for n in ends)

    def _is_settled(self, find: Find, end: int) -> bool:
        """Whether the words after a find are enough to know that no more of them change it."""
        folded = find.text.folded
        tail = max((len(phrase) - at - len(self.text) for phrase, at in self.vetoes), default=0)
        if len(folded) - end < 2 + self.dotted + tail:
            return False
        if is_unspaced(self.text[-1]):
            return True
        later = find.text.cased[find.last + 1 :]
        if not later or (len(later) == 1 and len(later[0]) < 2):
            return False
        is_wary = self.is_of_a_kind or self.is_everyday and begins_sentence(find)
        is_open = is_wary or may_go_on(find, is_proper=self.is_proper)
        return len(later) > READ_AHEAD + 1 or not is_open


def word_finds(text: str, name: str) -> Iterator[int]:
    """Where `name` stands in `text` as words.

    >>> list(word_finds("oman, romania, 在oman的", "oman"))
    [0, 16]
    """
    start = text.find(name)
    while start >= 0:
        if _starts_word(text, start) and _ends_word(text, start + len(name)):
            yield start
        start = text.find(name, start + 1)


def _starts_word(text: str, start: int) -> bool:
    return start == 0 or not (_is_spaced_letter(text[start - 1]) and _is_spaced_letter(text[start]))


def _ends_word(text: str, end: int) -> bool:
    """Whether a name may end before position `end`."""
    if end == len(text) or _HANGUL.match(text[end]):
        return True
    return not (_is_spaced_letter(text[end - 1]) and _is_spaced_letter(text[end]))


def _is_spaced_letter(char: str) -> bool:
    """A letter, digit or combining mark of a script that puts spaces between words."""
    return (char.isalnum() or unicodedata.category(char)[0] == "M") and not is_unspaced(char)


@cache
def _longer_names() -> tuple[str, ...]:
    return tuple(words_of(name).folded for name in sorted(word_lists()["longer_names"]))


def _compile_names(name: str, near_misses: Sequence[str]) -> Iterator[_Name]:
    """A name in all its spellings."""
    own, lists = words_of(name).folded, word_lists()
    phrases = [words_of(phrase).folded for phrase in near_misses]
    phrases += [phrase for phrase in _longer_names() if phrase not in own]
    phrases += [own + UNIVERSITY] if is_unspaced(own[-1]) and not own.endswith(UNIVERSITY) else []
    for spelling in spellings_of(name, is_common=common_words()):
        full = words_of(" ".join(spelling.words)).folded
        text = full.rstrip(FINAL_MARKS) or full
        shouted = frozenset(n for n, word in enumerate(spelling.words) if _is_shouted_word(word))
        spelled = " ".join(spelling.words)
        capitals = words_that_need_capitals(spelling.words)
        yield _Name(
            text=text,
            key=max((word for word in text.split() if word not in WRITTEN_OUT), key=len, default=""),
            dotted=text != full,
            vetoes=tuple((p, i) for p in phrases for i in range(len(p)) if p.startswith(text, i)),
            spelling=Spelling(spelling.words, spelling.initials, spelling.glued | shouted),
            capitals=capitals,
            is_proper=any(core(word)[:1].isupper() for word in spelling.words),
            is_function_word=text in lists["function_words"],
            is_everyday=bool(capitals - shouted)
            and not spelling.initials
            and spelled not in lists["regions"],
            is_of_a_kind=text in lists["mass_kinds"],
        )


def _is_shouted_word(word: str) -> bool:
    """Whether an everyday word is in capitals that it needs: an initialism like "WHO"."""
    return len(word) in range(2, INITIALISM_LETTERS + 1) and word.isupper() and word.lower() in common_words()


class AnswerMatcher:
    """The compiled names of one fact's answers: build once for each fact, ask for each completion.

    Args:
        answers: gold answers; any of them counts.
        aliases: an answer that the table lists also counts under the other names of its row.
        anywhere: an answer counts inside another name and in any case, too: it can be read off the text.

    Raises:
        UserInputError: there is no answer, or one is blank.
    """

    __slots__ = ("_anywhere", "_names", "_numbers")

    def __init__(
        self, answers: Sequence[str], aliases: AliasTable | None = None, *, anywhere: bool = False
    ) -> None:
        if not answers or any(not normalise(answer) for answer in answers):
            raise UserInputError(
                Problem(
                    what="a fact needs at least one answer and no blank one",
                    got=repr(list(answers)),
                    remedy="fix or drop this row of the facts",
                )
            )
        table = aliases or AliasTable(rows={})
        self._anywhere = anywhere
        self._names: list[_Name] = []
        self._numbers: list[re.Pattern[str]] = []
        for row in dict.fromkeys(table.row_of(answer) for answer in answers):
            for name in row.names:
                if number := number_pattern(tidy(name)) or date_pattern(tidy(name)):
                    self._numbers.append(number)
                else:
                    self._names += _compile_names(name, row.near_misses)

    def matches(self, text: str) -> bool:
        """Whether `text` holds one of the answers.

        >>> AnswerMatcher(["St. Louis"]).matches("He was born in St. Louis, Missouri.")
        True
        >>> AnswerMatcher(["Oman"]).matches("He was a Roman.")
        False
        """
        return self._finds(text, settled=False)

    def is_settled(self, text: str) -> bool:
        """Whether `text`, an unfinished completion, matches and will match however it goes on.

        >>> matcher = AnswerMatcher(["Oman"])
        >>> matcher.is_settled("It is in Oman"), matcher.is_settled("It is in Oman, on")
        (False, True)
        """
        return self._finds(text.rstrip(UNDECODED), settled=True)

    def _finds(self, text: str, *, settled: bool) -> bool:
        tidied = tidy(text)
        if self._names and self._finds_names(tidied, settled=settled):
            return True
        last = len(tidied) - (SETTLED_AFTER if settled else 0)
        finds = (found for number in self._numbers for found in number.finditer(tidied))
        return any(
            found.end() <= last and (self._anywhere or not is_of_a_name(found, no_names=words_of_no_name()))
            for found in finds
        )

    def _finds_names(self, tidied: str, *, settled: bool) -> bool:
        """In the text as it is, or without hyphens or accents."""
        if self._any_occurs(tidied, settled=settled):
            return True
        return any(self._any_occurs(version, settled=settled) for version in versions_of(tidied))

    def _any_occurs(self, tidied: str, *, settled: bool) -> bool:
        """Whether one of the names stands in a tidy text."""
        folded = fold(tidied)
        near = [name for name in self._names if name.key in folded]
        words = words_of(tidied) if near else None
        return words is not None and any(
            name.occurs_in(words, settled=settled, anywhere=self._anywhere) for name in near
        )
