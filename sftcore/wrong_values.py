"""Values that a section can't take: what pydantic finds, in our words.

In: the errors of a `ValidationError`. Out: `Misfit`s: the key, the value, what the key takes.
Invariant: no sentence of pydantic's reaches a user; what a key takes in several forms ("a number, or auto")
is said at once.
Trade-off: words are kept by pydantic's error types (30 of about 100), those that a section of ours can meet;
another type reads "another value", without a limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sftcore.display import shown_value

FORM = re.compile(r"(constrained-)?(float|int|str|bool)|(literal|list|dict|tuple)\[.*\]|[A-Z]\w*")
UNKNOWN, MISSING, OWN = "extra_forbidden", "missing", "value_error"
NAME_PATTERN = r"^\.*[\w-][\w.-]*$"
ALLOWED = {  # pydantic's type of error -> what the key takes; braces: of the error's context
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "greater_than": "a number over {gt}",
    "greater_than_equal": "a number of {ge} or more",
    "less_than": "a number under {lt}",
    "less_than_equal": "a number of {le} or less",
    "literal_error": "{expected}",
    "string_type": "text",
    "string_unicode": "UTF-8 text",
    "string_too_short": "text of {min_length} letters or more",
    "string_too_long": "text of {max_length} letters or fewer",
    "string_pattern_mismatch": "text like {pattern}",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (keys with values)",
    "model_attributes_type": "a section (keys with values)",
    "too_short": "a list with {min_length} or more items",
    "too_long": "a list with {max_length} or fewer items",
}
NAME_WORDS = "letters, digits, '.', '_' and '-', not dots alone"
QUOTES = "put it in quotes, so that it is text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """One key with a wrong value.

    Args:
        location: of the key; numbers are positions in lists.
        kind: pydantic's type of the error.
        what: the sentence a user reads first.
        got: the value, "" where it says nothing.
        allowed: what the key takes.
        remedy: what to do, where the value itself tells that.
    """

    location: tuple[str | int, ...]
    kind: str
    what: str
    got: str
    allowed: str = ""
    remedy: str = ""


def misfits(errors: Iterable[Any]) -> list[Misfit]:
    """The errors of a `ValidationError`, those of one key as one."""
    by_key: dict[tuple[str | int, ...], list[Any]] = {}
    for error in errors:
        by_key.setdefault(_location(error), []).append(error)
    inside = {key[:length] for key in by_key for length in range(len(key))}
    return [
        _misfit(key, found)
        for key, found in by_key.items()
        if not (key in inside and isinstance(found[0].get("input"), dict))  # it is a section: what is in it
    ]


def _location(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The key's place, without pydantic's names of the forms that it was tried as."""
    if not error["loc"]:
        return ()  # the whole
    *above, last = error["loc"]
    is_key = error["type"] == UNKNOWN or not isinstance(last, str) or not FORM.fullmatch(last)
    parts = [part for part in above if not (isinstance(part, str) and FORM.fullmatch(part))]
    return (*parts, *([last] if is_key else []))


def _misfit(location: tuple[str | int, ...], found: list[Any]) -> Misfit:
    first = found[0]
    kind, value = first["type"], first.get("input")
    if kind == UNKNOWN:
        return Misfit(location=location, kind=kind, what="unknown key", got="")
    if kind == MISSING and location and isinstance(location[-1], int):
        return Misfit(location=location, kind=kind, what="an item of this list is missing", got="")
    if kind == MISSING:
        return Misfit(location=location, kind=kind, what="required key is missing", got="", remedy="add it")
    got = "" if isinstance(value, dict | BaseModel) else shown_value(value)
    if kind == "string_unicode":
        return Misfit(location=location, kind=kind, what="this is not UTF-8 text", got=got)
    if kind == OWN:
        return Misfit(location=location, kind=kind, what=first["msg"].removeprefix("Value error, "), got=got)
    wants_text = all(error["type"] == "string_type" for error in found)
    return Misfit(
        location=location,
        kind=kind,
        what="this key does not take such a value",
        got=got or shown_value(value),
        allowed=", or ".join(dict.fromkeys(_allowed(error) for error in found)),
        remedy=QUOTES if wants_text and isinstance(value, int | float) else "",
    )


def _allowed(error: Mapping[str, Any]) -> str:
    context = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in error.get("ctx", {}).items()
    }
    if context.get("pattern") == NAME_PATTERN:
        return NAME_WORDS
    return ALLOWED.get(error["type"], "another value").format_map(context)
