"""Pairs of texts: whether they mean the same, asked in their own language, answered by a label's word.

In: two texts, a label, perhaps the reason for it. Out: what `Content` asks of them; label words and verdicts.
Invariant: a pair is the same in either order; its answer is written, and read, in the pair's language.
Trade-off: solved examples are written into each prompt (k of them cost k pairs of texts a sample), in the
language of the pair that is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftcore.data.ledger import Reason
from sftcore.data.rationales import Order, compose_answer, parse_answer
from sftcore.knowledge.containment import AliasTable
from sftcore.settings import LabelWords, MatchingSettings
from sftcore.tasks.kinds.content import Content, Form, Pieces, Refusal, Reply, joined, normalised
from sftcore.tasks.template import Template

CJK_LETTER_SHARE = 0.1  # of a pair's letters; 5 of the 4,000 PAWS-X Chinese pairs lie below it (2026-11)
LANGUAGES = ("zh", "en")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Content):
    """Two texts and whether they mean the same (`label`: 0 different, 1 same, -1 unknown), perhaps why."""

    a: str
    b: str
    label: int
    rationale: str | None = None

    @property
    def gold(self) -> int:
        return self.label

    @property
    def why(self) -> str | None:
        return self.rationale

    @property
    def example_group(self) -> str:
        return str(self.label)

    def asked(self) -> tuple[str, str]:
        text = joined(*sorted((normalised(self.a), normalised(self.b))))
        return text, text

    def written(self) -> str:
        return joined(self.a, self.b, str(self.label), self.rationale or "")

    def plain_texts(self) -> tuple[str, ...]:
        return self.a, self.b, self.rationale or ""

    def cuttable(self) -> list[str]:
        return [self.a, self.b]

    def with_cuttable(self, texts: Sequence[str]) -> Pair:
        return replace(self, a=texts[0], b=texts[1])

    def pieces(self, form: Form) -> Pieces:
        if form.joins_texts:
            return self.a, self.b
        examples = [Pair(**example.model_dump()) for example in form.matching.examples]
        shown = [_pair_texts(example, self, form) for example in examples]
        prompt, completion = _pair_texts(self, self, form)
        return "".join(f"{p}{c}\n\n" for p, c in shown) + prompt, completion

    def why_untrained(self, form: Form) -> Refusal | None:
        if form.matching.rationale == "none" or self.rationale is not None:
            return None
        return Refusal(reason=Reason.NO_RATIONALE, detail="the pair has no rationale")

    def graded(self, text: str, reply: Reply | None, *, form: Form, aliases: AliasTable) -> dict[str, Any]:
        label = self.pieces(form)[1].strip()
        return {"label": label, "correct": text.strip() == label}


def pair_in(content: Content) -> Pair:
    """The pair of a record of task matching, which reads no other kind."""
    assert isinstance(content, Pair), "task matching reads pairs"
    return content


def language_of(pair: Pair, setting: str) -> str:
    """ "zh" or "en": `matching.language`, or by the pair's script if that is "auto".

    >>> language_of(Pair(a="北京 Beijing", b="上海", label=0), "auto")
    'zh'
    """
    if setting != "auto":
        return setting
    letters = [char for char in pair.a + pair.b if char.isalpha()]
    num_cjk = sum("\u3400" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0003ffff" for char in letters)
    return "zh" if letters and num_cjk >= CJK_LETTER_SHARE * len(letters) else "en"


def words_in(language: str, labels: LabelWords) -> tuple[str, str]:
    """Text of label 0 and of label 1 in "zh" or "en"."""
    return labels.zh if language == "zh" else labels.en


def label_words(pair: Pair, settings: MatchingSettings) -> tuple[str, str]:
    """Text of label 0 and of label 1 in the pair's language."""
    return words_in(language_of(pair, settings.language), settings.labels)


def label_answers(pair: Pair, form: Form, *, stops: bool) -> tuple[str, str]:
    """What would be trained after a pair's prompt for label 0 and for label 1.

    Args:
        stops: whether the model has learnt to stop after a label; else the label is compared alone.
    """
    words = label_words(pair, form.matching)
    is_nested = words[0].startswith(words[1]) or words[1].startswith(words[0])  # the shorter always wins
    ends_line = form.matching.rationale == "after" or (is_nested and not stops)
    different, same = (f"{words[0]}\n", f"{words[1]}\n") if ends_line else words
    template = _template_of(pair, form)
    nothing = dict.fromkeys(("a", "b", "label_0", "label_1"), "")  # completions hold the label only
    return (
        template.fill(nothing | {"label": different})[1],
        template.fill(nothing | {"label": same})[1],
    )


def said_label(text: str, pair: Pair, settings: MatchingSettings) -> int | None:
    """The label of a generated answer, or None where there is none in the trained form."""
    language = language_of(pair, settings.language)
    words = words_in(language, settings.labels)
    return parse_answer(text, words, order=settings.rationale, language=language)


def _pair_texts(pair: Pair, asked: Pair, form: Form) -> tuple[str, str]:
    """Prompt and completion of a pair in the language of the pair that is asked about."""
    settings = form.matching
    different, same = words = label_words(asked, settings)
    order: Order = settings.rationale if pair.rationale else "none"
    language = language_of(asked, settings.language)
    answer = compose_answer(words[pair.label], pair.rationale, order=order, language=language)
    values = {"a": pair.a, "b": pair.b, "label_0": different, "label_1": same}
    return _template_of(asked, form).fill(values | {"label": answer})


def _template_of(pair: Pair, form: Form) -> Template:
    if "any" in form.templates:
        return form.templates["any"]
    return form.templates[language_of(pair, form.matching.language)]
