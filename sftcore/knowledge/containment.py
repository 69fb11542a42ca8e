"""Whether a text holds an answer: the one rule that the probe and the scoring share.

In: a model's text, a fact's gold answers, the alias table. Out: yes or no.
Invariant: one more gold answer never turns a yes into a no.
Trade-off: names are sought with `str.find` and their edges looked at only where they were found. A text of
150 characters takes 2 to 4 us, 12 us if it isn't ASCII, most of that NFKC (two-core machine, November 2026).

METHODS.md M1 leaves containment open; decided here:
* Texts and names are compared after NFKC, case folding and one kind of quote, dash, space and middle dot
  (列奥纳多・达・芬奇).
* A name counts only as whole words in scripts that put spaces between words. Chinese, Japanese, Thai, Lao,
  Khmer and Burmese don't: plain substring there. Korean does, but glues particles to the end of a noun, so a
  name needs a word border before it and none before a following Hangul syllable.
* The full stop that ends a name is optional: "Canon Inc." is found in "made by Canon Inc in Japan".
* A name in capitals that folds to an everyday word ("US", "MIT") must stand in capitals in the text.
* An alias may have near misses: "America" doesn't count inside "South America".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of

ALIASES_PATH = Path(__file__).parent.parent / "assets" / "aliases.tsv"
HEADER = "canonical\taliases"
NEAR_MISS_MARK = "!"
MIN_NAME_LENGTH = 2  # characters of an alias
UNDECODED = "\ufffd"  # what a tokenizer puts for bytes that don't make a character yet
MATCHERS_KEPT = 4096  # about 2 kB each; callers come fact by fact, so even 1 would do

_PLAIN_MARKS = str.maketrans("‘’ʼ“”‐‑‒–—・•‧∙⋅", "'''\"\"-----·····")
_UNSPACED = (
    re.compile(  # Thai and Lao; Burmese; Khmer; radicals, kana, bopomofo, Han; kana and Han past 16 bits
        "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u3130\u3190-\u9fff\uf900-\ufaff"
        "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
    )
)
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_EVERYDAY_WORDS = frozenset(
    "am an and are as at be but by can do for go had has he her him his if in is it its la may me mit my no "
    "not now of off on one or our out see she so the to un up us was way we who you".split()
)


def tidy(text: str) -> str:
    """NFKC, plain quotes, dashes and middle dots, single spaces; the case is kept."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """The form in which texts are compared: tidy and case-folded.

    >>> normalise("  The  ﬁrst ‘Café’ of ŌSAKA ")
    "the first 'café' of ōsaka"
    """
    return _fold(tidy(text))


def _fold(tidied: str) -> str:
    folded = tidied.casefold()
    return folded if folded.isascii() else unicodedata.normalize("NFKC", folded)


def is_unspaced(char: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return _UNSPACED.match(char) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasRow:
    """One row of the alias table.

    Args:
        names: canonical name first, then its aliases; each stands for all the others.
        near_misses: longer phrases in which a name of this row means something else.
    """

    names: tuple[str, ...]
    near_misses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AliasTable:
    """Rows of names that mean the same, found by any of their names.

    Args:
        rows: normalised name -> its row; every name of a row is a key.
    """

    rows: Mapping[str, AliasRow]

    @classmethod
    def load(cls, path: Path = ALIASES_PATH) -> AliasTable:
        """Read a table: a header, then `canonical<TAB>alias|alias|!near miss` a line.

        Raises:
            UserInputError: with every line that is malformed or repeats a name of another line.
        """
        lines = path.read_text(encoding="utf-8").splitlines()
        problems = [] if lines[:1] == [HEADER] else [_wrong_header(path, lines)]
        rows: dict[str, AliasRow] = {}
        for number, line in enumerate(lines[1:], start=2):
            row = _parse_row(line)
            keys = {normalise(name) for name in row.names}
            faults = [
                *_row_faults(row),
                *(f"'{key}' stands in an earlier line too" for key in keys & rows.keys()),
            ]
            problems += [Problem(what=fault, where=f"{path}:{number}", got=line) for fault in sorted(faults)]
            rows.update(dict.fromkeys(keys, row))
        if problems:
            raise UserInputError(*problems)
        return cls(rows=rows)

    def row_of(self, answer: str) -> AliasRow:
        """The row that lists `answer`, or a row of `answer` alone."""
        return self.rows.get(normalise(answer), AliasRow(names=(answer,), near_misses=()))

    def fingerprint(self) -> str:
        """Identity of what the table says, for the manifests of what was judged with it."""
        return fingerprint_of({name: [row.names, row.near_misses] for name, row in self.rows.items()})


def _wrong_header(path: Path, lines: Sequence[str]) -> Problem:
    return Problem(what="wrong header", where=f"{path}:1", got=repr(lines[:1]), allowed=repr(HEADER))


def _parse_row(line: str) -> AliasRow:
    """`Mexico<TAB>México|!New Mexico` -> names (Mexico, México), near misses (New Mexico,)."""
    canonical, _, aliases = line.partition("\t")
    items = aliases.split("|")
    names = (canonical, *(item for item in items if not item.startswith(NEAR_MISS_MARK)))
    return AliasRow(
        names=names, near_misses=tuple(item[1:] for item in items if item.startswith(NEAR_MISS_MARK))
    )


def _row_faults(row: AliasRow) -> Iterator[str]:
    """What is wrong with one row taken by itself."""
    if len(row.names) < 2:
        yield "a row needs a canonical name and at least one alias"
    for name in row.names:
        if len(name.strip()) < MIN_NAME_LENGTH or name != name.strip():
            yield f"name '{name}' is shorter than {MIN_NAME_LENGTH} characters or has spaces around it"
    for phrase in row.near_misses:
        if not any(normalise(name) in normalise(phrase) for name in row.names):
            yield f"near miss '{phrase}' holds no name of its row"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Name:
    """One spelling to look for.

    Args:
        text: normalised, or tidy if it must stand in capitals; without a final full stop.
        dotted: a full stop was cut off its end.
        vetoes: (phrase, offset of `text` in it): a find with the phrase around it doesn't count.
    """

    text: str
    dotted: bool
    vetoes: tuple[tuple[str, int], ...]

    def occurs_in(self, text: str, *, settled: bool = False) -> bool:
        """Whether the name stands in `text` (in the same form), as words and outside near misses.

        Args:
            text: what is searched.
            settled: count only finds so far from the end that no continuation of `text` could undo them.
        """
        last = len(text) - (self._settling_distance() if settled else 0)
        start = text.find(self.text, 0, last)
        while start >= 0:
            if self._counts_at(text, start):
                return True
            start = text.find(self.text, start + 1, last)
        return False

    def _settling_distance(self) -> int:
        """Characters that must follow a find: its border, one that fixes that, what `_counts_at` reads."""
        tails = (len(phrase) - offset - len(self.text) for phrase, offset in self.vetoes)
        return 2 + self.dotted + max(tails, default=0)

    def _counts_at(self, text: str, start: int) -> bool:
        end = start + len(self.text)
        if not (_starts_word(text, start) and _ends_word(text, end)):
            return False
        if self.dotted and text[end : end + 1] == "." and not _ends_word(text, end + 1, after=text[end - 1]):
            return False  # "U.S." in "U.S.S.R."
        return not any(
            start >= offset and text.startswith(phrase, start - offset) for phrase, offset in self.vetoes
        )


def _is_spaced_letter(char: str) -> bool:
    """A letter, digit or combining mark of a script that puts spaces between words."""
    return (char.isalnum() or unicodedata.category(char)[0] == "M") and not is_unspaced(char)


def _starts_word(text: str, start: int) -> bool:
    return start == 0 or not (_is_spaced_letter(text[start - 1]) and _is_spaced_letter(text[start]))


def _ends_word(text: str, end: int, after: str = "") -> bool:
    """Whether a name may end before position `end`; `after` replaces the character before it."""
    if end == len(text) or _HANGUL.match(text[end]):
        return True
    return not (_is_spaced_letter(after or text[end - 1]) and _is_spaced_letter(text[end]))


def _needs_capitals(name: str) -> bool:
    return name.isupper() and normalise(name) in _EVERYDAY_WORDS


def _compile_name(name: str, near_misses: Sequence[str]) -> _Name:
    full = tidy(name) if _needs_capitals(name) else normalise(name)
    text = full.rstrip(".") or full
    phrases = [normalise(phrase) for phrase in near_misses]
    vetoes = tuple((p, i) for p in phrases for i in range(len(p)) if p.startswith(text, i))
    return _Name(text=text, dotted=text != full, vetoes=vetoes)


class AnswerMatcher:
    """The compiled names of one fact's answers: build once for each fact, ask for each completion.

    Args:
        answers: gold answers; any of them counts.
        aliases: an answer that the table lists also counts under the other names of its row.

    Raises:
        UserInputError: there is no answer, or one is blank.
    """

    __slots__ = ("_folded", "_in_capitals")

    def __init__(self, answers: Sequence[str], aliases: AliasTable | None = None) -> None:
        if not answers or any(not normalise(answer) for answer in answers):
            raise UserInputError(
                Problem(
                    what="a fact needs at least one answer and no blank one",
                    got=repr(list(answers)),
                    remedy="mend or drop this row of the facts",
                )
            )
        table = aliases or AliasTable(rows={})
        self._folded: list[_Name] = []
        self._in_capitals: list[_Name] = []
        for row in dict.fromkeys(table.row_of(answer) for answer in answers):
            for name in row.names:
                kind = self._in_capitals if _needs_capitals(name) else self._folded
                kind.append(_compile_name(name, row.near_misses))

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
        folded = _fold(tidied)
        return any(name.occurs_in(folded, settled=settled) for name in self._folded) or any(
            name.occurs_in(tidied, settled=settled) for name in self._in_capitals
        )


@lru_cache(maxsize=MATCHERS_KEPT)
def _matcher_of(answers: tuple[str, ...], aliases: AliasTable | None) -> AnswerMatcher:
    return AnswerMatcher(answers, aliases)


def contains_answer(text: str, answers: Sequence[str], aliases: AliasTable | None = None) -> bool:
    """Whether `text` holds one of `answers` or an alias of one; see `AnswerMatcher`.

    >>> contains_answer("巴黎是法国的首都。", ["法国"])
    True
    """
    return _matcher_of(tuple(answers), aliases).matches(text)
