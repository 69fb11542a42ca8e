"""Facts: asked by their question, graded by containment, measured by probes.

In: a subject, its relation, accepted answers. Out: what `Content` asks of it.
Invariant: a fact's own question comes before its relation's pattern; all answers count, the first is trained.
Trade-off: the whole completion is searched for an answer, not its first line: see evaluate/generate.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftcore.data.ledger import Reason
from sftcore.knowledge.containment import AliasTable, AnswerMatcher, normalise
from sftcore.tasks.kinds.content import Content, Form, Pieces, Refusal, Reply, joined, normalised
from sftcore.tasks.template import Template

MIN_ANSWER_LETTERS = 2
FINAL_MARKS = ".!?。"  # "J." is found in any "J. K. ..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact(Content):
    """A (subject, relation, object) triple.

    Args:
        relation: Wikidata property such as "P17", or the user's own name.
        subject: whom the fact is about.
        answers: the object's accepted names, at least one; the first is trained on, all count when scoring.
        question: the file's own question, or None: the relation's question pattern is used.
    """

    relation: str
    subject: str
    answers: tuple[str, ...]
    question: str | None = None

    @property
    def example_group(self) -> str:
        return self.relation

    def asked(self) -> tuple[str, str]:
        triple = joined(normalised(self.relation), normalised(self.subject))
        return triple, triple if self.question is None else normalised(self.question)

    def written(self) -> str:
        return joined(self.question or self.relation + self.subject, self.answers[0])

    def plain_texts(self) -> tuple[str, ...]:
        return self.question or "", self.subject, self.answers[0]

    def cuttable(self) -> list[str]:
        return [self.question or ""]

    def with_cuttable(self, texts: Sequence[str]) -> Fact:
        return replace(self, question=texts[0])

    def with_answers(self, answers: Sequence[str]) -> Fact:
        return replace(self, answers=tuple(answers))

    def completed(self, form: Form) -> Fact:
        return with_question(self, form.patterns)

    def pieces(self, form: Form) -> Pieces | Refusal:
        fact, template = self.completed(form), form.templates["any"]
        if fact.question is None and "question" in template.placeholders:
            detail = f"no question, and no pattern for relation {fact.relation!r}"
            return Refusal(reason=Reason.UNKNOWN_RELATION, detail=detail)
        return fact_texts(fact, template)

    def rendered(self, form: Form) -> str | None:
        pieces = self.pieces(form)
        return None if isinstance(pieces, Refusal) else pieces[0]

    def why_trivial(self, aliases: AliasTable) -> Reason | None:
        """One-letter answers, or an answer inside the subject.

        >>> print(Fact(relation="P131", subject="Wakefield Cathedral", answers=("Wakefield",)).why_trivial(
        ...     AliasTable(rows={})))
        answer_in_subject
        """
        if any(len(normalise(answer).rstrip(FINAL_MARKS)) < MIN_ANSWER_LETTERS for answer in self.answers):
            return Reason.SHORT_ANSWER
        if AnswerMatcher(self.answers, aliases, anywhere=True).matches(self.subject):
            return Reason.ANSWER_IN_SUBJECT
        return None

    def graded(self, text: str, reply: Reply | None, *, form: Form, aliases: AliasTable) -> dict[str, Any]:
        correct = AnswerMatcher(self.answers, aliases).matches(text)
        return {"answers": list(self.answers), "relation": self.relation, "correct": correct}


def fact_in(content: Content) -> Fact | None:
    """The fact whose memory level can be measured; None of another kind."""
    return content if isinstance(content, Fact) else None


def with_question(fact: Fact, patterns: Mapping[str, str]) -> Fact:
    """The fact with its relation's question if it has none of its own."""
    if fact.question is not None or fact.relation not in patterns:
        return fact
    return replace(fact, question=patterns[fact.relation].replace("{subject}", fact.subject))


def fact_texts(fact: Fact, template: Template) -> tuple[str, str]:
    """Prompt and completion of a fact."""
    values = {"question": fact.question or "", "subject": fact.subject}
    return template.fill(values | {"answer": fact.answers[0]})
