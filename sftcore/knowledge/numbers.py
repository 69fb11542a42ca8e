"""Whether a text holds a number, and not a longer one, a range or a name that it is a part of.

In: an answer that is a number. Out: a pattern that finds it in tidy text, and whether a find is no name's.
Invariant: 500 is not in "1,500", "500.5", "-500", "400-500", "500 million" or "S&P 500"; 1500, 1,500 and
1 500 are the same.
Trade-off: a point is always a decimal one ("1.500" is not 1500), as in English and Chinese. Years may begin
and end ranges ("1914-1918"); of other numbers "4-5" is neither.
"""

from __future__ import annotations

import re
from collections.abc import Set

_NUMBER = re.compile(r"-?\d+(?:[,' ]\d{3})*(?:\.\d+)?")
_HAN = "零〇一二三四五六七八九十百千万萬亿億两兩"
_HAN_NUMBER = re.compile(f"[{_HAN}]+")
_SPACED_LETTER = (  # of a script that puts spaces between words
    "[^\\W\\d_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u3130\u3190-\u9fff\uac00-\ud7ff\uf900-\ufaff]"
)
_UNITS = "(?:[kcmµμ]?m|k?g|mg|lb|lbs|oz|ft|mi|km/h|kmh|kph|mph|[kMGT]?Hz|[kMGT]W|[kKMGT]B|ml|ha|[ap]m)"
_SCALES = "(?:hundred|thousand|million|billion|trillion|dozen)"
_BEFORE = rf"(?<!\d)(?<!{_SPACED_LETTER})(?<!\d[.,:'])(?<![\^×])"
_BEHIND = (
    rf"(?![.,:']?\d)(?:(?!{_SPACED_LETTER})|(?={_UNITS}(?!\w)))(?![\^×]|[百千万萬亿億])(?!(?: |-){_SCALES})"
)
_NO_GROUP_BEFORE = r"(?<!\b\d )(?<!\b\d\d )(?<!\b\d\d\d )"
_NO_GROUP_BEHIND = r"(?! \d{3}(?!\d))"
_NO_RANGE_BEFORE = r"(?<!\d[-/])(?<![A-Z]-)"  # 4-5, 20/20; F-16
_NO_RANGE_BEHIND = r"(?![-/]\d)"
_PLUS = r"(?<!\s-)(?<!^-)(?<!\(-)(?<!minus )(?<!negative )(?<![负負])(?<!零下)"
_MINUS = r"(?:(?<!\w)(?<!\d )(?:-|minus |negative )|[负負]|零下)"
GROUP = 3  # digits between separators
SETTLED_AFTER = 14  # characters after a number that may be looked at: " established" and the next
_NAME_BEFORE = re.compile(r"(?:(\S) |^)([A-Z][^\s.,:;!?()\"]*) $")
_PLURALS = frozenset("people men women children percent per feet km".split())
_CURRENCIES = frozenset("USD EUR GBP CHF JPY CNY RMB INR AUD CAD RM RS NT".split())


def number_pattern(answer: str) -> re.Pattern[str] | None:
    """What finds a number; None if the answer is none.

    >>> found = number_pattern("1500")
    >>> [bool(found.search(text)) for text in ("in 1,500 towns", "in 1500年", "in 21,500", "1500.5", "15000")]
    [True, True, False, False, False]
    """
    if _HAN_NUMBER.fullmatch(answer):
        return re.compile(f"(?<![{_HAN}]){answer}(?![{_HAN}])")
    if not _NUMBER.fullmatch(answer):
        return None
    sign, digits = ("-", answer[1:]) if answer[0] == "-" else ("", answer)
    whole, point, decimals = digits.partition(".")
    whole = re.sub("[,' ]", "", whole)
    first = len(whole) % GROUP or GROUP
    groups = [whole[:first], *(whole[i : i + GROUP] for i in range(first, len(whole), GROUP))]
    body = "[,' ]?".join(groups) + (re.escape(point) + decimals)
    before = _BEFORE + (_NO_GROUP_BEFORE if first == GROUP else "")
    signed = f"{_MINUS}{body}" if sign else f"{_PLUS}{body}"
    is_year = not point and len(whole) == GROUP + 1
    if not is_year:
        before, body = _NO_RANGE_BEFORE + before, body + _NO_RANGE_BEHIND
        signed += _NO_RANGE_BEHIND
    is_group = not point and len(whole) <= GROUP
    return re.compile(f"{before}{signed}{_BEHIND}{_NO_GROUP_BEHIND if is_group else ''}")


def is_of_a_name(found: re.Match[str], *, no_names: Set[str]) -> bool:
    """Whether a number of at most three digits belongs to the name before it: "Apollo 11", "the S&P 500".

    A word in small letters after it counts things ("in Lima 20 years").

    Args:
        no_names: words that stand before numbers or open sentences, in small letters.
    """
    text, start, end = found.string, found.start(), found.end()
    if not text[start].isdigit() or end - start > GROUP or text[start - 1 : start] != " ":
        return False
    before = _NAME_BEFORE.search(text[max(0, start - 40) : start])
    if before is None or before[2].upper() in _CURRENCIES or before[2].lower() in no_names:
        return False
    opens = before[1] is None or before[1] in ".!?:"
    if opens and before[2][1:] == before[2][1:].lower():
        return False
    later = re.match(r" ([a-z]+)", text[end:])
    return "&" in before[2] or later is None or not counts_things(later[1], no_names=no_names)


def counts_things(word: str, *, no_names: Set[str]) -> bool:
    """Whether a word after a number is what is counted: a plural.

    >>> [counts_things(word, no_names={"was"}) for word in ("years", "people", "was", "crew")]
    [True, True, False, False]
    """
    return word in _PLURALS or word.endswith("s") and word not in no_names
