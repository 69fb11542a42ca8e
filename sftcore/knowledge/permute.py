"""The decisive control of memory levels: the same answers, on the wrong facts.

In: the selected facts. Out: the same facts, each with the answers of another fact of its relation.
Invariant: a relation's answers are the same as before, each as often; where answers repeat, as few facts as
possible keep an equal one. What such a run gains is form and marginals, not facts.
Trade-off: a rotation by the size of the largest group of equal answers rather than a draw of all
derangements: no fact keeps an equal answer where that can be had, at the cost of a less mixed order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.levels import FactLevel
from sftcore.knowledge.selection import rank


def permuted_answers(facts: Sequence[FactLevel], *, seed: int, draw: int) -> list[FactLevel]:
    """`facts` in their order, with answers exchanged within each relation.

    Sorted by their first answer, a relation's facts take the answers of those k places further, with k the
    number of facts with the most frequent answer: equal answers stand together, so none is left in its group
    as long as that is at most half of the facts.

        answers       A  A  B  C         k = 2
        exchanged     B  C  A  A

    Raises:
        UserInputError: relations whose facts all have one answer: nothing can be exchanged there.
    """
    relations: dict[str, list[FactLevel]] = {}
    for fact in facts:
        relations.setdefault(fact.relation, []).append(fact)
    alike = [relation for relation, own in relations.items() if len({f.answers[0] for f in own}) == 1]
    if alike:
        raise UserInputError(_nothing_to_exchange(alike))
    exchanged: dict[str, tuple[str, ...]] = {}
    for own in relations.values():
        exchanged |= _rotated(own, seed=seed, draw=draw)
    return [replace(fact, answers=exchanged[fact.id]) for fact in facts]


def num_kept(before: Sequence[FactLevel], after: Sequence[FactLevel]) -> int:
    """Facts whose first answer is an equal one after the exchange."""
    return sum(old.answers[0] == new.answers[0] for old, new in zip(before, after, strict=True))


def _rotated(facts: Sequence[FactLevel], *, seed: int, draw: int) -> dict[str, tuple[str, ...]]:
    """Id -> answers of the fact that many places further."""
    counts = Counter(fact.answers[0] for fact in facts)
    first = {answer: rank(answer, seed, draw) for answer in counts}  # so that each draw has another order
    ordered = sorted(facts, key=lambda fact: (first[fact.answers[0]], rank(fact.id, seed, draw)))
    places = max(counts.values())
    return {fact.id: ordered[(i + places) % len(ordered)].answers for i, fact in enumerate(ordered)}


def _nothing_to_exchange(relations: Sequence[str]) -> Problem:
    return Problem(
        what="the selected facts of a relation all have one answer: there is nothing to permute",
        where="select.answers",
        got=", ".join(relations[:10]),
        remedy="select more facts of it (select.n), or leave these relations out of data.train",
    )
