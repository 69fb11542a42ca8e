"""The subject of a question, recovered from the wording that all questions of a relation share.

In: all questions of one relation. Out: their subjects, in the same order.
Invariant: shared start + subject + shared end == question, for each question; no subject is empty.
Trade-off: nothing but the questions is needed (no list of patterns to keep in step with the data), at the
price that words which all subjects share are taken for wording. Give whole relations, not samples: the 24
relations of EntityQuestions (1,763 to 8,000 questions each) come out right, two questions about two battles
don't.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence

from sftcore.errors import Problem, UserInputError

QUESTION_TAIL_STARTS = "'’?"  # besides a space: "X's child?", "the capital of X?"


def recover_subjects(questions: Sequence[str]) -> list[str]:
    """Strip the longest start and the longest end that all `questions` share, cut back to word borders.

    The cut keeps letters that all subjects happen to share (P and s here):

        Where was |Paris's zoo    | founded?
        Where was |Peter's parks  | founded?
        ~~~~~~~~~~ P            s ~~~~~~~~~~
        shared                       shared

    >>> recover_subjects(["Where was Paris's zoos founded?", "Where was Peter's parks founded?"])
    ["Paris's zoos", "Peter's parks"]

    Raises:
        UserInputError: the questions share no words, or a subject would be empty (e.g. a single question).
    """
    start = _cut_start(os.path.commonprefix(list(questions)))
    end = _cut_end(os.path.commonprefix([question[::-1] for question in questions])[::-1])
    if not any(char.isalpha() for char in start + end):
        raise UserInputError(_no_shared_wording(questions))
    subjects = [question[len(start) : len(question) - len(end)] for question in questions]
    if "" in subjects:
        raise UserInputError(_empty_subject(questions[subjects.index("")], start, end))
    return subjects


def _cut_start(shared: str) -> str:
    """Drop a torn word at the end of the shared start."""
    while shared and not _is_border(shared[-1]):
        shared = shared[:-1]
    return shared


def _cut_end(shared: str) -> str:
    """Drop a torn word at the start of the shared end."""
    while shared and not (_is_border(shared[0]) or shared[0] in QUESTION_TAIL_STARTS):
        shared = shared[1:]
    return shared


def _is_border(char: str) -> bool:
    """A space, or a wide character (Chinese, Japanese, Korean): no word is torn next to one."""
    return char.isspace() or unicodedata.east_asian_width(char) in "WF"


def _no_shared_wording(questions: Sequence[str]) -> Problem:
    return Problem(
        what="the questions share no wording, so their subjects can't be known from it",
        got=f"{len(questions)} questions, first {list(questions[:2])}",
        allowed="all questions of one relation, in one pattern",
        remedy="give each relation its own file, or use the format `facts`, which names the subject",
    )


def _empty_subject(question: str, start: str, end: str) -> Problem:
    return Problem(
        what=f"no subject is left between '{start}' and '{end}', which all questions share",
        got=question,
        allowed="at least two questions of one relation about different subjects",
        remedy="give the whole relation, or use the format `facts`, which names the subject",
    )
