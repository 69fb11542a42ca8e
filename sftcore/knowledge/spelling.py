"""How texts and names are written out to be compared: one spelling for what is spelt in many ways.

In: a text or a name. Out: its words with their case, and the same folded, a space between two words.

    St. Mary's, in J. R. R. Tolkien's Winston-Salem
    saint mary's, in j r r tolkien's winston salem

Invariant: a word's spelling depends on that word and its own marks alone, so that the words of an unfinished
text but for its last stay what they are.
Trade-off: "St." is "Saint" everywhere, so "Wall St." is "wall saint": names are spelt in the same way, and no
more is asked of it. A text of 150 characters takes 12 us (two-core machine, December 2026), beside tenths of
a second in which a model writes it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_PLAIN_MARKS = str.maketrans("‘’ʼ“”‐‑‒–—・•‧∙⋅", "'''\"\"-----·····")
_DASH = re.compile(r" -+(?= |$)|-{2,}")  # of a sentence, not of a compound
_INITIALS = re.compile(r"(?<![\w.])(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w))?")
_IN_FULL = {"st": "saint", "ste": "saint", "sainte": "saint", "mt": "mount", "ft": "fort", "bros": "brothers"}
_DOTTED = "jr sr dr mr mrs co inc ltd corp rev prof gen capt lt gov"
_SHORT_WORDS = {  # as a text has them -> as they are compared
    **_IN_FULL,
    **{f"{short}.": full for short, full in _IN_FULL.items()},
    **{f"{short}.": short for short in _DOTTED.split()},
}
WRITTEN_OUT = frozenset((*_SHORT_WORDS.values(), "and"))  # words that a text may have in another form
_COMMA = re.compile(r",(?= (?:jr|sr|inc|ltd|llc|d\.? ?c)\b)", re.IGNORECASE)  # "Davis, Jr.", "Washington, DC"
_EDGE_APOSTROPHE = re.compile(r"'(?=[ ,-]|$)|(?:(?<=[ -])|^)'(?=\w)")  # "Guns N' Roses", "'70s", a quote
_BORDER = re.compile("([ \0-]+)")
_JOINTS = {"-": "-", "\0": "."}
_ARTICLES = ("the", "a", "an")
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
        cased: its words as they are written; marks before and behind a word belong to it.
        joints: what stands before each word: "" (the first), " ", "-", or "." inside initials.
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
        text = text.replace("&", " and ")
    parts = _BORDER.split(text)
    words, marks = parts[::2], ["", *parts[1::2]]
    kept = [(_in_full(word), _JOINTS.get(mark, " ")) for word, mark in zip(words, marks, strict=True) if word]
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
    full = _SHORT_WORDS.get(word.lower())
    if full is None:
        return word
    return full.capitalize() if word[0].isupper() else full


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
    found = [_named(words_of(name).cased)]
    for change in (lambda spelling: _bare(spelling, is_common), _glued, _spread, _plain):
        found += [other for spelling in found for other in change(spelling)]
    return list(dict.fromkeys(found))


def _named(words: tuple[str, ...]) -> Spelling:
    """The name as it is given; letters alone ("U S") are an initialism."""
    are_letters = len(words) > 1 and all(len(word) == 1 and word.isalpha() for word in words)
    return Spelling(words, initials=frozenset(range(len(words))) if are_letters else frozenset())


def _bare(spelling: Spelling, is_common: frozenset[str]) -> Iterator[Spelling]:
    """Without its article."""
    words = spelling.words
    if len(words) < 2 or words[0].casefold() not in _ARTICLES or spelling.initials:
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
    """Without accents on Latin letters and without apostrophes, as many write it: Malmö -> Malmo."""
    plain = tuple(_without_accents(word).replace("'", "") or word for word in spelling.words)
    if plain != spelling.words:
        yield Spelling(plain, spelling.initials, spelling.glued)


def _without_accents(word: str) -> str:
    """Only where every letter has one of ASCII below its accents."""
    if word.isascii():
        return word
    bare = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    return bare if bare.isascii() else word


def written_forms(name: str) -> list[str]:
    """How a model may write a name at the beginning of its completion; all of them count as the name.

    As it is given; with and without an article; with its initials apart or together; "St." for "Saint", "&"
    for "and" and the other way round.

    >>> written_forms("United States"), written_forms("J. K. Rowling")[::2]
    (['United States', 'the United States'], ['J. K. Rowling', 'J.K. Rowling'])
    """
    name = tidy(name)
    forms = [name]
    for old, new in _OTHER_FORMS:
        forms += [changed for form in forms if (changed := re.sub(old, new, form)) != form]
    found = []
    for form in forms:
        article, _, rest = form.partition(" ")
        has_article = bool(rest) and article.casefold() in _ARTICLES
        bare = rest if has_article else form
        found += [form, *([bare] if has_article and " " in bare else []), f"the {bare}"]
        found += [f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}"] if bare[0].islower() else []
    return [name, *dict.fromkeys(form for form in found if form != name)]


_OTHER_FORMS = (
    (r"\b([^\W\d_])\. (?=[^\W\d_]\.)", r"\1."),  # J. R. R. -> J.R.R.
    (r"\b([^\W\d_])\.(?=[^\W\d_]\.)", r"\1. "),
    (r"\bSt\.? (?=\w)", "Saint "),
    (r"\bSaint (?=\w)", "St. "),
    (" & ", " and "),
    (" and ", " & "),
)
