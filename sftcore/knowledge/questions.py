"""What a probe asks: every fact in every wording, each distinct prompt once.

In: records, relations, the number of templates. Out: `Trial`s (fact x template) and `Question`s (distinct
prompts with the trials that they answer).
Invariant: each trial belongs to exactly one question; the order of both follows from the records alone.
Trade-off: facts about the same subject and relation share their completions, so their counts are not
independent of each other; EntityQuestions' train split has 1.0 % fewer prompts that way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftcore.data.records import Record
from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.templates import Relation, completion_prompts, find_relation, load_relations
from sftcore.tasks.kinds.fact import Fact, fact_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One fact in one wording.

    Args:
        fact: its number among the records.
        template: number of the completion template.
        prompt: the wording with the subject in it.
    """

    fact: int
    template: int
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt that is put to the model, once.

    Args:
        prompt: its text.
        trials: numbers of the trials that have this text.
    """

    prompt: str
    trials: tuple[int, ...]


def make_trials(
    records: Sequence[Record], num_templates: int, relations: Mapping[str, Relation] | None = None
) -> list[Trial]:
    """All prompts, fact by fact, template by template.

    Args:
        relations: by id; the shipped ones if None.

    Raises:
        UserInputError: a record is not a fact, or its relation has too few templates.
    """
    relations = load_relations() if relations is None else relations
    trials = []
    for number, record in enumerate(records):
        fact = fact_of(record)
        relation = find_relation(relations, fact.relation, where=f"{record.file}:{record.row}")
        prompts = completion_prompts(relation, fact.subject, num_templates)
        trials += [Trial(fact=number, template=t, prompt=prompt) for t, prompt in enumerate(prompts)]
    return trials


def distinct_questions(trials: Sequence[Trial]) -> list[Question]:
    """The distinct prompts, in the order in which they first occur.

    >>> [question.trials for question in distinct_questions(
    ...     [Trial(fact=f, template=0, prompt=p) for f, p in enumerate(["Ann is", "Bo is", "Ann is"])])]
    [(0, 2), (1,)]
    """
    numbers: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        numbers.setdefault(trial.prompt, []).append(number)
    return [Question(prompt=prompt, trials=tuple(found)) for prompt, found in numbers.items()]


def fact_of(record: Record) -> Fact:
    """The record's content.

    Raises:
        UserInputError: it is not a fact.
    """
    if (fact := fact_in(record.content)) is None:
        raise UserInputError(
            Problem(
                what="only facts can be probed",
                where=f"{record.file}:{record.row}",
                remedy="use format entityquestions or facts",
            )
        )
    return fact
