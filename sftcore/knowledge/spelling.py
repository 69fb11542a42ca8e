"""How texts and names are written out to be compared: one spelling for what is spelt in many ways.

In: a text or a name. Out: its words with their case, and the same folded, a space between two words.

    St. Mary's, in J. R. R. Tolkien's Winston-Salem
    saint mary's, in j r r tolkien's winston salem

Invariant: a word's spelling depends on that word and its own marks alone, so that the words of an unfinished
text but for its last stay what they are.
Trade-off: "St." is "Saint" everywhere, so "Wall St." is "wall saint": names are spelt in the same way, and no
more is asked of it. A text of 150 characters takes 12 us (two-core machine, December 2026), next to tenths of
a second in which a model writes it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_PLAIN_MARKS = str.maketrans("‘’ʼ“”‐‑‒–—−・•‧∙⋅", "'''\"\"------·····")
_DASH = re.compile(r" -+(?= |$)|-{2,}")  # of a sentence, not of a compound
_INITIALS = re.compile(r"(?<![\w.])(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w))?")
_IN_FULL = {"st": "saint", "ste": "saint", "sainte": "saint", "mt": "mount", "ft": "fort", "bros": "brothers"}
_DOTTED = "jr sr dr mr mrs co inc ltd corp rev prof gen capt lt gov"
_SHORT_WORDS = {  # as a text has them -> as they are compared
    "&": "and",
    **_IN_FULL,
    **{f"{short}.": full for short, full in _IN_FULL.items()},
    **{f"{short}.": short for short in _DOTTED.split()},
}
WRITTEN_OUT = frozenset((*_SHORT_WORDS.values(), "and"))  # words that a text may have in another form
_COMMA = re.compile(
    r",(?= (?:jr|sr|inc|ltd|llc|d\.?[ \0]?c)\b)", re.IGNORECASE
)  # "Davis, Jr.", "Washington, DC"
_EDGE_APOSTROPHE = re.compile(r"'(?=[ ,-]|$)|(?:(?<=[ -])|^)'(?=\w)")  # "Guns N' Roses", "'70s", a quote
_BORDER = re.compile("([ \0-]+)")
_JOINTS = {"-": "-", "\0": "."}
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_PLAIN_LETTERS = str.maketrans(
    dict(
        zip(
            "ØøŁłĐđÐðıĦħÆæŒœÞþß",
            "O o L l D d D d i H h Ae ae Oe oe Th th ss".split(),
            strict=True,
        )
    )
)
_UMLAUTS = "ÄÖÜÅØäöüåø"
_TWO_LETTERS = str.maketrans(dict(zip(_UMLAUTS, "Ae Oe Ue Aa Oe ae oe ue aa oe".split(), strict=True)))
_INSTITUTIONS = frozenset(("University", "College", "School", "Institute"))
_ROMAN = "I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX".split()
_IN_WORDS = "One Two Three Four Five Six Seven Eight Nine Ten".split()
_NUMERALS = tuple((r, str(n), *_IN_WORDS[n - 1 : n]) for n, r in enumerate(_ROMAN, start=1))  # of names
ARTICLES = ("the", "a", "an")
GLUED_LETTERS = range(2, 6)  # of an initialism: "US" to "UNHCR"


def tidy(text: str) -> str:
    """NFKC, plain quotes, dashes and middle dots, single spaces; the case is kept."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS)
    return " ".join(text.split())


def normalise(text: str) -> str:
    """Tidy and case-folded: the key under which a name is looked up.

    >>> normalise("  The  ﬁrst ‘Café’ of ŌSAKA ")
    "the first 'café' of ōsaka"
    """
    return fold(tidy(text))


def fold(tidied: str) -> str:
    """Case-folded, still in NFKC."""
    folded = tidied.casefold()
    return folded if folded.isascii() else unicodedata.normalize("NFKC", folded)


@dataclass(frozen=True, slots=True)
class Words:
    """A text in the spelling that is compared.

    Args:
        cased: its words as they are written; marks before and after a word belong to it.
        joints: what stands before each word: "" (the first), " ", "-", "." inside initials, "&" before an
            "and" that is written so.
        folded: the words folded, a space between two.
    """

    cased: tuple[str, ...]
    joints: tuple[str, ...]
    folded: str


def words_of(text: str) -> Words:
    """A text or a name, spelt out.

    >>> words_of("St. Mary's, U.S., and the Anglo-French AT&T").folded
    "saint mary's, u s , and the anglo french at and t"
    """
    text = tidy(text)
    if "-" in text:
        text = _DASH.sub(" ,", text)
    if "." in text:
        text = _INITIALS.sub(_spaced_initials, text)
    if "," in text:
        text = _COMMA.sub("", text)
    if "'" in text:
        text = _EDGE_APOSTROPHE.sub("", text)
    if "&" in text:
        text = text.replace("&", " & ")
    parts = _BORDER.split(text)
    words, marks = parts[::2], ["", *parts[1::2]]
    kept = [
        (_in_full(word), "&" if word == "&" else _JOINTS.get(mark, " "))
        for word, mark in zip(words, marks, strict=True)
        if word
    ]
    cased = tuple(word for word, _ in kept)
    joints = tuple(joint if number else "" for number, (_, joint) in enumerate(kept))
    folded = fold(" ".join(cased))
    if folded.count(" ") != len(cased) - 1:  # a mark that folds to a space and something
        folded = " ".join(fold(word).replace(" ", "") for word in cased)
    return Words(cased, joints, folded)


def _spaced_initials(found: re.Match[str]) -> str:
    letters = found[0].replace(".", "")
    is_cased = letters.lower() != letters.upper()
    return "\0".join(letters) + " " if is_cased else found[0]


def _in_full(word: str) -> str:
    """A short word written out, with its capital: St. -> Saint."""
    bare = word.rstrip(",;:") if word[-1] in ",;:" and word[-2:-1] == "." else word
    full = _SHORT_WORDS.get(bare.lower())
    if full is None:
        return word
    return (full.capitalize() if word[0].isupper() else full) + word[len(bare) :]


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to write a name.

    Args:
        words: as in `Words.cased`.
        initials: numbers of the words that are letters of an initialism, in capitals or with full stops.
        glued: numbers of the words that are initialisms without full stops, in capitals only.
    """

    words: tuple[str, ...]
    initials: frozenset[int] = frozenset()
    glued: frozenset[int] = frozenset()


def spellings_of(name: str, *, is_common: frozenset[str]) -> list[Spelling]:
    """The ways to write a name that count as that name: with and without article, initials, accents.

    Args:
        is_common: everyday words; an article is needed before a lone one ("The Doors").

    >>> [" ".join(s.words) for s in spellings_of("The J.R.R. Tolkien Society", is_common=frozenset())]
    ['The J R R Tolkien Society', 'J R R Tolkien Society', 'The JRR Tolkien Society', 'JRR Tolkien Society']
    """
    words = words_of(name)
    found = [_named(words.cased), *map(Spelling, _joined(words)), *map(Spelling, _recommaed(words))]
    for change in (lambda spelling: _bare(spelling, is_common), _renumbered, _glued, _spread, _plain):
        found += [other for spelling in found for other in change(spelling)]
    return list(dict.fromkeys(found))


def _joined(name: Words) -> Iterator[tuple[str, ...]]:
    """Without its hyphens: Spider-Man -> SpiderMan."""
    if "-" not in name.joints:
        return
    words: list[str] = []
    for joint, word in zip(name.joints, name.cased, strict=True):
        if joint == "-":
            words[-1] += word
        else:
            words.append(word)
    yield tuple(words)


def _recommaed(name: Words) -> Iterator[tuple[str, ...]]:
    """Without its commas or with one before "and"; a university's place after a comma, "at" or neither."""
    words, last = name.cased, len(name.cased) - 1
    commas = [n for n in range(last) if words[n][-1] == ","]
    if commas:
        yield tuple(word.rstrip(",") for word in words)
        if "and" in words[1:] and words[words.index("and", 1) - 1][-1] != ",":
            at = words.index("and", 1)
            yield (*words[: at - 1], words[at - 1] + ",", *words[at:])
    if not any(word in _INSTITUTIONS for word in words):
        return
    borders = {*(n + 1 for n in commas), *(n for n in range(1, last + 1) if name.joints[n] == "-")}
    borders |= {n for n in range(1, last) if words[n] == "at"}
    for n in sorted(borders):
        before, later = (*words[: n - 1], words[n - 1].rstrip(",")), words[n + (words[n] == "at") :]
        yield (*before, *later)
        yield (*before, "at", *later)
        yield (*before[:-1], before[-1] + ",", *later)


def _renumbered(spelling: Spelling) -> Iterator[Spelling]:
    """With a Roman number in digits or as a word, and the other way round: World War II -> World War 2."""
    words, last = spelling.words, len(spelling.words) - 1
    if spelling.initials:
        return
    for n in range(1, last + 1):
        value = next((v for v, forms in enumerate(_NUMERALS, start=1) if words[n] in forms), 0)
        is_plain = len(words[n]) > 1 or words[n].isdigit() or n == last  # no "V" of "J. V. Stalin"
        if value and is_plain and words[n - 1][:1].isupper():
            for form in _NUMERALS[value - 1]:
                if form != words[n] and not (form.isalpha() and n < last and not form.isupper()):
                    yield Spelling((*words[:n], form, *words[n + 1 :]), glued=spelling.glued)


def _named(words: tuple[str, ...]) -> Spelling:
    """The name as it is given; letters alone ("U S") are an initialism."""
    are_letters = len(words) > 1 and all(len(word) == 1 and word.isalpha() for word in words)
    return Spelling(words, initials=frozenset(range(len(words))) if are_letters else frozenset())


def _bare(spelling: Spelling, is_common: frozenset[str]) -> Iterator[Spelling]:
    """Without its article."""
    words = spelling.words
    if len(words) < 2 or words[0].casefold() not in ARTICLES or spelling.initials:
        return
    is_safe = words[0].casefold() == "the" and words[1].casefold() not in is_common
    if is_safe or len(words) > 2:
        yield Spelling(words[1:])


def _glued(spelling: Spelling) -> Iterator[Spelling]:
    """With its initials in one word: J R R -> JRR."""
    words: list[str] = []
    glued = set()
    run = ""
    for word in (*spelling.words, ""):
        if len(word) == 1 and word.isupper():
            run += word
            continue
        if len(run) in GLUED_LETTERS:
            glued.add(len(words))
            words.append(run)
        else:
            words += run
        run = ""
        words += [word] if word else []
    if glued:
        yield Spelling(tuple(words), glued=frozenset(glued))


def _spread(spelling: Spelling) -> Iterator[Spelling]:
    """With the letters of its initialisms apart: EMI -> E M I."""
    words: list[str] = []
    initials = set()
    for number, word in enumerate(spelling.words):
        if len(word) in GLUED_LETTERS and word.isascii() and word.isupper() and number not in spelling.glued:
            initials |= set(range(len(words), len(words) + len(word)))
            words += word
        else:
            words.append(word)
    if initials:
        yield Spelling(tuple(words), initials=frozenset(initials))


def _plain(spelling: Spelling) -> Iterator[Spelling]:
    """Without accents on Latin letters, without apostrophes, without both; with "ue" for "ü"."""
    for change in (without_accents, _without_apostrophes, lambda w: without_accents(_without_apostrophes(w))):
        changed = tuple(map(change, spelling.words))
        if changed != spelling.words:
            yield Spelling(changed, spelling.initials, spelling.glued)
    spread = tuple(without_accents(word.translate(_TWO_LETTERS)) for word in spelling.words)
    if any(letter in _UMLAUTS for word in spelling.words for letter in word):
        yield Spelling(spread, spelling.initials, spelling.glued)


def _without_apostrophes(word: str) -> str:
    return word.replace("'", "") or word


def without_accents(word: str) -> str:
    """Only where every letter has some of ASCII for it.

    >>> [without_accents(word) for word in ("Malmö", "Ørsted", "Łódź", "राम")]
    ['Malmo', 'Orsted', 'Lodz', 'राम']
    """
    if word.isascii():
        return word
    plain = unicodedata.normalize("NFD", word.translate(_PLAIN_LETTERS))
    bare = "".join(c for c in plain if not unicodedata.combining(c))
    return bare if bare.isascii() else word


def versions_of(tidied: str) -> Iterator[str]:
    """A text without hyphens in words (Spider-Man -> SpiderMan) and without accents, where that differs."""
    if "-" in tidied and (joined := _HYPHEN.sub("", tidied)) != tidied:
        yield joined
    if not tidied.isascii() and (bare := " ".join(map(without_accents, tidied.split(" ")))) != tidied:
        yield bare
