"""The dullest explanation of a gain: always the relation's most frequent training answer, whatever is asked.

In: the training facts (rows of selection.jsonl), graded predictions. Out: the same items as this rule would
answer them, graded alike; what a model has over it.
Invariant: the rule sees the training facts only; it is judged by the same containment as a model's answer.
Trade-off: a relation without training facts has no rule: its items count as wrong, and a split without any
such relation has no constant at all. With 60 facts of ten relations the rule is drawn from 6 answers each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sftcore.evaluate.score import mcnemar_p, mean_interval
from sftcore.knowledge.containment import AliasTable, AnswerMatcher

Row = Mapping[str, Any]


def frequent_answers(facts: Sequence[Row]) -> dict[str, str]:
    """The answer that most training facts of each relation have; of equally frequent ones the first.

    Args:
        facts: rows with `relation` and `answers`, of which the first is trained on.

    >>> frequent_answers([{"relation": "P36", "answers": [a]} for a in ("Lima", "Oslo", "Oslo")])
    {'P36': 'Oslo'}
    """
    counts: dict[str, Counter[str]] = {}
    for fact in facts:
        if fact.get("relation") is not None and fact.get("answers"):
            counts.setdefault(fact["relation"], Counter())[fact["answers"][0]] += 1
    return {relation: found.most_common(1)[0][0] for relation, found in counts.items()}


def constant_rows(facts: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]] | None:
    """Predictions of the rule for the items of one split, graded.

    Args:
        facts: rows of selection.jsonl.
        rows: predictions of a model, with `relation` and `answers`.

    Returns:
        the same rows with the rule's `prediction` and `correct`; None where no item is of a trained relation.
    """
    rule, aliases = frequent_answers(facts), AliasTable.load()
    if not any(row.get("relation") in rule for row in rows):
        return None
    found = []
    for row in rows:
        text = rule.get(row.get("relation") or "", "")
        correct = bool(text) and AnswerMatcher(tuple(row.get("answers") or ()), aliases).matches(text)
        found.append({**row, "prediction": text, "correct": correct})
    return found


def over_constant(constant: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """What a model has over the rule on the same items: `{difference, low, high, gained, lost, p_value}`.

    Difference and its normal 95 % interval are of the paired differences of items; p is exact McNemar's.
    """
    was_right = {row["id"]: row["correct"] for row in constant}
    pairs = [(was_right[row["id"]], row["correct"]) for row in rows]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    difference, low, high = mean_interval([float(after) - float(before) for before, after in pairs])
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "gained": gained,
        "lost": lost,
        "p_value": mcnemar_p(gained, lost),
    }
