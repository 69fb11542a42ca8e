"""Whether a text holds a number, and not a longer one that it is a part of.

In: an answer that is a number. Out: a pattern that finds it in tidy text.
Invariant: 500 is not in "1,500", "500.5" or "-500"; 1500, 1,500 and 1 500 are the same.
Trade-off: a point is always a decimal one ("1.500" is not 1500), as in English and Chinese.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d+(?:[,' ]\d{3})*(?:\.\d+)?")
_HAN = "零〇一二三四五六七八九十百千万萬亿億两兩"
_HAN_NUMBER = re.compile(f"[{_HAN}]+")
_SPACED_LETTER = (  # of a script that puts spaces between words
    "[^\\W\\d_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u3130\u3190-\u9fff\uac00-\ud7ff\uf900-\ufaff]"
)
_BEFORE = rf"(?<!\d)(?<!{_SPACED_LETTER})(?<!\d[.,:'])"
_BEHIND = rf"(?![.,:']?\d)(?!{_SPACED_LETTER})"
_NO_GROUP_BEFORE = r"(?<!\b\d )(?<!\b\d\d )(?<!\b\d\d\d )"
_NO_GROUP_BEHIND = r"(?! \d{3}(?!\d))"
GROUP = 3  # digits between separators
SETTLED_AFTER = 6  # characters behind a number that may be looked at: " 000" and the next


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
    signed = rf"(?<!\w)(?<!\d )-{body}" if sign else rf"(?<!\s-)(?<!^-)(?<!\(-){body}"
    is_group = not point and len(whole) <= GROUP
    return re.compile(f"{before}{signed}{_BEHIND}{_NO_GROUP_BEHIND if is_group else ''}")
