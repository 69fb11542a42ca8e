"""Whether a text holds a date, in whatever order its parts are written.

In: an answer that is a date ("5 May 1990", "May 5, 1990", "5 May", "1990-05-05"). Out: what finds it in tidy
text.
Invariant: day, month and year are all there and no other: "15 May 1990" does not hold 5 May 1990.
Trade-off: "05/06/1990" is two dates and never taken for one, which loses some hits.
"""

from __future__ import annotations

import re

MONTHS = "January February March April May June July August September October November December".split()
_MONTH = rf"(?P<month>{'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in MONTHS)}|Sept)\.?"
_DAY = r"(?P<day>\d\d?)(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>\d{4})"
_WRITTEN = tuple(
    re.compile(form)
    for form in (
        rf"{_DAY}(?: of)? {_MONTH}(?:,? {_YEAR})?",
        rf"{_MONTH} {_DAY}(?:,? {_YEAR})?",
        rf"{_MONTH},? {_YEAR}",
        rf"{_YEAR}-(?P<number>\d\d)-{_DAY}",
        rf"{_YEAR}年(?P<number>\d\d?)月(?:{_DAY}日)?",
    )
)


def date_pattern(answer: str) -> re.Pattern[str] | None:
    """What finds a date; None if the answer is none.

    >>> found = date_pattern("5 May 1990")
    >>> [bool(found.search(text)) for text in ("on May 5th, 1990", "1990-05-05", "15 May 1990", "5 May 1991")]
    [True, True, False, False]
    """
    parts = next((found.groupdict() for form in _WRITTEN if (found := form.fullmatch(answer))), None)
    if parts is None:
        return None
    number = int(parts.get("number") or 0) or _number_of(parts["month"])
    if number > len(MONTHS):
        return None
    return re.compile(_forms(number, parts.get("day"), parts.get("year")), re.IGNORECASE)


def _number_of(month: str) -> int:
    return next(n for n, name in enumerate(MONTHS, start=1) if name.startswith(month[:3]))


def _forms(number: int, day: str | None, year: str | None) -> str:
    """All orders of the parts that are given."""
    name = MONTHS[number - 1]
    month = rf"(?:{name}|{name[:3]}\b\.?{'|Sept' + chr(92) + '.?' if name == 'September' else ''})"
    if day is None:
        return rf"(?<!\w){month},?(?: of)? {year}(?!\w)|(?<!\d){year}年0?{number}月"
    in_day = rf"0?{int(day)}(?:st|nd|rd|th)?"
    tail = rf",?(?: of)? {year}" if year else ""
    numbered = rf"{year}-{number:02}-{int(day):02}" if year else rf"-{number:02}-{int(day):02}"
    chinese = rf"(?<!\d){year + '年' if year else ''}0?{number}月0?{int(day)}[日号]"
    return (
        rf"(?<![\w.,]){in_day}(?: of)? {month}{tail}(?![,.]?\d)(?![^\W\d_\u2e80-\u9fff])"
        rf"|(?<!\w){month} (?:the )?{in_day}{tail}(?![,.]?\d)(?![^\W\d_\u2e80-\u9fff])"
        rf"|{'(?<!' + chr(92) + 'd)' if year else '(?<=' + chr(92) + 'd)'}{numbered}(?!\d)|{chinese}"
    )
