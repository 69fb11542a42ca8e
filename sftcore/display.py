"""Text that is safe to show: no passwords, nothing that a terminal obeys, of bounded length.

In: any text or value. Out: text for messages, logs and names on a terminal.
Invariant: what comes out can be encoded as UTF-8, moves no cursor and changes no colour; a password or token
in a URL is never part of it.
Trade-off: secrets are known by where they stand (before a URL's @, after `token=`) or how they begin (hf_,
sk-), so one in a place of its own goes through; a look over 100 letters costs 3 microseconds.
"""

from __future__ import annotations

import re
from typing import Any

MASK = "***"
VALUE_LETTERS = 80
URL_LOGIN = re.compile(r"(?<=://)[^/\s?#'\"]*@")  # user:password@host, up to the last @ of the authority
URL_SECRET = re.compile(
    r"([?&;#][\w.~-]{0,40}(?:token|key|secret|passw|pwd|auth|sig|cred|session)[\w.~-]{0,40}=)[^&;\s#'\"]+",
    re.IGNORECASE,
)
KEYS = re.compile(r"\b(hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abp]-)[\w-]{12,}|(\bBearer\s+)[^\s'\"]{8,}")
# what a terminal obeys or lays out again, line ends, and half characters; tab and "\n" are apart
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def masked(text: str) -> str:
    """`text` without the passwords and tokens of its URLs.

    >>> masked("https://me:pa@ss@host/v1?api_key=abc&n=1")
    'https://***@host/v1?api_key=***&n=1'
    """
    if "://" in text:
        text = URL_SECRET.sub(rf"\1{MASK}", URL_LOGIN.sub(f"{MASK}@", text))
    return KEYS.sub(lambda found: f"{found[1] or found[2]}{MASK}", text)


def inert(text: str) -> str:
    r"""`text` with control characters and what can't be encoded as escapes; line ends and tabs stay.

    >>> inert("a\x1b[31m\tb\ud800")
    'a\\x1b[31m\tb\\ud800'
    """
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, letters: int) -> str:
    """`text`, without its middle if it is longer than `letters`.

    >>> shortened("abcdefghijklm", 11)
    'abcd ... lm'
    """
    if len(text) <= letters:
        return text
    end = (letters - 5) // 3
    return f"{text[: letters - 5 - end]} ... {text[len(text) - end :]}"


def shown(text: str, letters: int) -> str:
    """`text` for a message: masked first (a cut might hide where a password stands), inert, shortened."""
    return shortened(inert(masked(text)), letters)


def shown_value(value: Any, letters: int = VALUE_LETTERS) -> str:
    """A value as Python writes it, whatever it is: too long a number, a list that holds itself.

    >>> shown_value({"a": [1, 2]}), shown_value(16**5000)[:28]
    ("{'a': [1, 2]}", 'a whole number of 20001 bits')
    """
    if isinstance(value, int) and value.bit_length() > 300:
        return f"a whole number of {value.bit_length()} bits"
    try:
        return shown(repr(value), letters)
    except (ValueError, RecursionError):  # of more digits than Python writes; nested too deeply
        return f"a {type(value).__name__}"
