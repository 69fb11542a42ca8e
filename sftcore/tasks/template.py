"""Templates: where the texts of a record go, and which places a task's templates have.

In: a prompt and a completion with {placeholders}. Out: the same with texts put in.
Invariant: text that is put in is never read as a placeholder again.
Trade-off: placeholders are plain names, no format specs or attributes: str.format on a user's text would let
`{question.__class__}` through (cost: about 1 microsecond per text for joining the parts ourselves).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

DEFAULT_TEMPLATE = "qa-plain"  # of `data.template`; a task that it doesn't fit has another in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Placeholders:
    """What a task's templates may and must hold (of `prompt_needs`, one is enough)."""

    prompt_needs: tuple[tuple[str, ...], ...]
    prompt_allows: tuple[str, ...]
    completion_needs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt and a completion with {placeholders}; "{{" stands for a brace."""

    name: str
    prompt: str
    completion: str

    @property
    def placeholders(self) -> frozenset[str]:
        """Names in the prompt."""
        return frozenset(name for _, name in _parts(self.prompt) if name)

    def fill(self, values: Mapping[str, str]) -> tuple[str, str]:
        """Prompt and completion with `values` put in.

        >>> Template(name="t", prompt="Q: {question}", completion=" {answer}").fill(
        ...     {"question": "Is {answer} a word?", "answer": "Yes"}
        ... )
        ('Q: Is {answer} a word?', ' Yes')
        """
        return _filled(self.prompt, values), _filled(self.completion, values)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return "".join(part + (values[name] if name else "") for part, name in _parts(text))


@cache
def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(text))
