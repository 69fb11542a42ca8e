"""How a model may write a name at the beginning of its completion.

In: a name. Out: the same name in all forms that are worth a forward of their own.
Invariant: the name as it is given comes first, and no form twice.
Trade-off: each form costs a forward of some tokens: two for a plain name, six for "J. K. Rowling". Rarer
forms ("Winston Salem") are left out.
"""

from __future__ import annotations

import re

from sftcore.knowledge.spelling import ARTICLES, tidy, without_accents

_OTHER_FORMS = (
    (r"\b([^\W\d_])\. (?=[^\W\d_]\.)", r"\1."),  # J. R. R. -> J.R.R.
    (r"\b([^\W\d_])\.(?=[^\W\d_]\.)", r"\1. "),
    (r"\bSt\.? (?=\w)", "Saint "),
    (r"\bSaint (?=\w)", "St. "),
    (r"\bMt\.? (?=\w)", "Mount "),
    (r"\bMount (?=\w)", "Mt. "),
    (r"\bFt\.? (?=\w)", "Fort "),
    (r"\bFort (?=\w)", "Ft. "),
    (" & ", " and "),
    (" and ", " & "),
)
_DOTTED = re.compile(r"(?<![\w.])(?:[A-Z]\. ?){1,5}(?!\w*\.)")  # J. R. R., U.S., F.
_GLUED = re.compile(r"(?<![\w./])(?![IVX]+\b)[A-Z]{2,5}(?![\w./])")  # JRR, US; no Roman number
_VOICED = re.compile(r"(?:[aeiou]|hours?\b|heir|hono|honest)", re.IGNORECASE)
_AS_YOU = re.compile(r"(?:uni(?!n|m)|us[aeu]|uto|uti|ut[ae]|ura|uro|eu|ewe|one\b|once\b|ubi)", re.IGNORECASE)


def written_forms(name: str) -> list[str]:
    """How a model may write a name at the beginning of its completion; all of them count as the name.

    As it is given; with and without an article; with its initials apart, together or without full stops;
    without accents; "St." for "Saint", "Mt." for "Mount", "&" for "and" and the other way round.

    >>> written_forms("United States"), written_forms("J. K. Rowling")[::2]
    (['United States', 'the United States'], ['J. K. Rowling', 'J.K. Rowling', 'JK Rowling'])
    """
    name = tidy(name)
    if not name:
        return []
    forms = [name]
    for old, new in _OTHER_FORMS:
        forms += [changed for form in forms if (changed := re.sub(old, new, form)) != form]
    forms += [changed for form in forms for changed in _initials(form) if changed != form]
    forms += [bare for form in forms if (bare := " ".join(map(without_accents, form.split(" ")))) != form]
    found = []
    for form in forms:
        article, _, rest = form.partition(" ")
        has_article = bool(rest) and article.casefold() in ARTICLES
        bare = rest if has_article else form
        found += [form, *([bare] if has_article and " " in bare else []), f"the {bare}"]
        found += [f"{_article(bare)} {bare}"] if bare[0].islower() else []
    return [name, *dict.fromkeys(form for form in found if form != name)]


def _initials(form: str) -> tuple[str, ...]:
    """J. K. Rowling -> JK Rowling; JK Rowling -> J. K. Rowling, J.K. Rowling; U.S. -> US.

    >>> _initials("U.S. Steel"), _initials("JK Rowling")
    (('US Steel',), ('J.K. Rowling', 'J. K. Rowling'))
    """
    if _DOTTED.search(form):
        return (_DOTTED.sub(_without_stops, form),)
    if not _GLUED.search(form):
        return ()
    dotted = _GLUED.sub(lambda found: "".join(f"{letter}." for letter in found[0]), form)
    is_person = _GLUED.match(form) and " " in form
    apart = _GLUED.sub(lambda found: " ".join(f"{letter}." for letter in found[0]), form)
    return (dotted, apart) if is_person else (dotted,)


def _without_stops(found: re.Match[str]) -> str:
    return re.sub(r"[. ]", "", found[0]) + (" " if found[0][-1] == " " else "")


def _article(word: str) -> str:
    """The indefinite article of a word, by its sound.

    >>> [_article(word) for word in ("hour", "actor", "university", "unit", "umbrella", "heiress", "poet")]
    ['an', 'an', 'a', 'a', 'an', 'an', 'a']
    """
    if len(word.split()[0]) == 1:
        return "an" if word[0] in "aefhilmnorsx" else "a"
    return "an" if _VOICED.match(word) and not _AS_YOU.match(word) else "a"
