"""Memory levels: how well a base model remembers a fact, from the counts of a probe.

In: hits and trials of a fact. Out: its level, 0 to 4, and its row of levels.jsonl.
Invariant: recall and level are always worked out from the two counts; a row that says otherwise is refused.
Trade-off: the bounds are worked out on integers, so 52 and 53 of 210 can't be argued about; the float recall
(15 digits in a row) is for readers and plots only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sftcore.errors import Problem, UserInputError

MAX_LEVEL = 4
LEVELS = range(MAX_LEVEL + 1)
CODE_VERSION = 2  # raise it when the same model and facts give other hits: questions, sampling, containment


def level_of(hits: int, trials: int) -> int:
    """The memory level (arXiv 2409.15825): 0 if R = hits / trials is 0, else i with R in ((i-1)/4, i/4].

        hits of 210:   0 | 1 .. 52 | 53 .. 105 | 106 .. 157 | 158 .. 210
        level:         0 |    1    |     2     |      3     |     4

    i = ceil(4 R) = ceil(4 hits / trials), in integers.

    >>> [level_of(hits, 210) for hits in (0, 1, 52, 53, 105, 106, 157, 158, 210)]
    [0, 1, 1, 2, 2, 3, 3, 4, 4]

    Raises:
        UserInputError: not 0 <= hits <= trials with at least one trial.
    """
    if not (trials >= 1 and 0 <= hits <= trials):
        raise UserInputError(
            Problem(
                what="impossible counts of a probe",
                got=f"hits {hits} of trials {trials}",
                allowed="0 <= hits <= trials, trials >= 1",
                remedy="probe again; this file was not written by one run",
            )
        )
    return -(-MAX_LEVEL * hits // trials)


@dataclass(frozen=True, kw_only=True, slots=True)
class FactLevel:
    """A fact with the outcome of its probe; one row of levels.jsonl.

    Args:
        id: unique within its split.
        relation: key of the relations table, e.g. P17.
        subject: as the fact names it.
        answers: gold answers, any of them counts.
        hits: completions that held an answer.
        trials: completions drawn (templates * samples).
        split: train, test or ood; "" where the file doesn't say.
    """

    id: str
    relation: str
    subject: str
    answers: tuple[str, ...]
    hits: int
    trials: int
    split: str = ""

    @property
    def recall(self) -> float:
        """hits / trials, in [0, 1]."""
        return self.hits / self.trials

    @property
    def level(self) -> int:
        """Memory level, 0 to 4."""
        return level_of(self.hits, self.trials)

    def to_row(self) -> dict[str, Any]:
        """The row of levels.jsonl."""
        return {
            "id": self.id,
            "relation": self.relation,
            "subject": self.subject,
            "answers": list(self.answers),
            "hits": self.hits,
            "trials": self.trials,
            "recall": self.recall,
            "level": self.level,
            "split": self.split,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> FactLevel:
        """Read a row of levels.jsonl; `split` may be absent.

        Raises:
            UserInputError: a key is missing, the counts are impossible, or recall or level disagrees.
        """
        missing = [key for key in _REQUIRED_KEYS if key not in row]
        if missing:
            raise UserInputError(
                Problem(
                    what=f"a row of levels.jsonl lacks {', '.join(missing)}",
                    got=str(dict(row)),
                    remedy="probe again (`sftcore probe RECIPE`)",
                )
            )
        values = {key: row[key] for key in ("id", "relation", "subject", "hits", "trials")}
        fact = cls(**values, answers=tuple(row["answers"]), split=row.get("split", ""))
        _check_agreement(fact, row)
        return fact


_REQUIRED_KEYS = ("id", "relation", "subject", "answers", "hits", "trials", "recall", "level")


def _check_agreement(fact: FactLevel, row: Mapping[str, Any]) -> None:
    """Refuse a row whose level or recall was not worked out from its own counts."""
    if (row["level"], row["recall"]) != (fact.level, fact.recall):
        raise UserInputError(
            Problem(
                what=f"fact '{fact.id}' disagrees with itself",
                got=f"level {row['level']}, recall {row['recall']}",
                allowed=f"level {fact.level}, recall {fact.recall} ({fact.hits} of {fact.trials})",
                remedy="probe again (`sftcore probe RECIPE`), or fix the row",
            )
        )


def level_counts(levels: Iterable[FactLevel]) -> dict[int, int]:
    """Number of facts of each level, all five levels present.

    >>> level_counts([])
    {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}
    """
    counts = Counter(fact.level for fact in levels)
    return {level: counts[level] for level in LEVELS}
