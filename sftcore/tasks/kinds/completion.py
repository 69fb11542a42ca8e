"""Prompts with their completion, both verbatim.

In: two texts. Out: what `Content` asks of them.
Invariant: neither text is changed: no template, and white space as it stands.
Trade-off: a reply is right only where it is the completion: exact, cheap, and blind to paraphrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftcore.knowledge.containment import AliasTable
from sftcore.tasks.kinds.content import Content, Form, Pieces, Reply, compared, joined, normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Content):
    """A prompt and what follows it, both verbatim."""

    prompt: str
    completion: str

    @property
    def is_verbatim(self) -> bool:
        return True

    def asked(self) -> tuple[str, str]:
        text = normalised(self.prompt)
        return text, text

    def written(self) -> str:
        return joined(self.prompt, self.completion)

    def plain_texts(self) -> tuple[str, ...]:
        return self.prompt, self.completion

    def cuttable(self) -> list[str]:
        return [self.prompt]

    def with_cuttable(self, texts: Sequence[str]) -> Completion:
        return replace(self, prompt=texts[0])

    def pieces(self, form: Form) -> Pieces:
        return self.prompt, self.completion

    def graded(self, text: str, reply: Reply | None, *, form: Form, aliases: AliasTable) -> dict[str, Any]:
        return compared(text, reply)
