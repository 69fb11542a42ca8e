"""From graded predictions to accuracies with intervals, and to what changed between two models.

In: rows of predictions.jsonl (`id`, `prompt`, `prediction`, `correct`, `split`; maybe `level`, `relation`).
Out: the content of scores.json, the same for two models side by side, and their paired change.
Invariant: the only owner of accuracies and intervals; each item counts once, `n` stands next to each share.
Trade-off: intervals are Wilson's, a formula instead of a bootstrap's 1,000 redraws of the items: good from
n = 10 on, but silent about the luck of the training draw, which only several runs can show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.levels import LEVELS as LEVELS

Row = Mapping[str, Any]
MAIN_SPLIT = "test"
FEW_ITEMS = 30  # below this a 95 % interval at one half is wider than +-17 points
Z = 1.96  # standard deviations to either side of a 95 % interval
FIELD_TYPES = {"id": (str, int), "prompt": (str,), "prediction": (str,), "correct": (bool,), "split": (str,)}
MAX_PROBLEMS_SHOWN = 5
CODE_VERSION = 2  # raise it when the same model and prompts give other rows or scores


def wilson_interval(correct: int, n: int, z: float = Z) -> tuple[float, float] | None:
    """Wilson's score interval of the share `correct / n`; None where n is 0.

    Formula: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), from E. B. Wilson, "Probable
    inference, the law of succession, and statistical inference", JASA 22 (1927). z = 1.96 gives 95 %.

    >>> [round(bound, 3) for bound in wilson_interval(5, 10)]
    [0.237, 0.763]
    >>> wilson_interval(0, 0) is None
    True
    """
    assert 0 <= correct <= n, f"{correct} correct of {n}"
    if n == 0:
        return None
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if correct == 0 else (centre - spread) / scale  # exact at both ends, where rounding
    high = 1.0 if correct == n else (centre + spread) / scale  # would leave 1e-17 on either side
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values (such as paired differences), and the normal 95 % interval around it.

    >>> mean_interval([1.0, 1.0]), mean_interval([0.5])
    ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5))
    """
    middle = fmean(values)
    half = Z * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return middle, middle - half, middle + half


def score(rows: Sequence[Row], *, where: str = "predictions.jsonl") -> dict[str, Any]:
    """Count graded predictions: the content of scores.json.

    Args:
        rows: one per item; an id occurs once per split.
        where: the name that errors give to the rows.

    Returns:
        `{split: "test", n, correct, accuracy, low, high, without_level, by_level, by_relation,
        mean_over_levels, levels_counted, splits}`: the top level is split "test" (n = 0 where there is none),
        `splits` holds the same keys for every split. Shares are 0..1, None where n is 0; `by_level` has the
        keys "0".."4" that have items; `mean_over_levels` weighs each of `levels_counted` alike.

    Raises:
        UserInputError: a row lacks a field, has one of the wrong type, or repeats an id.
    """
    _check_rows(rows, where=where)
    names = sorted({row["split"] for row in rows}, key=lambda name: (name != MAIN_SPLIT, name))
    splits = {name: _score_split([row for row in rows if row["split"] == name]) for name in names}
    main = splits.get(MAIN_SPLIT) or _score_split([])
    return {"split": MAIN_SPLIT, **main, "splits": splits}


def paired_change(
    base_rows: Sequence[Row], tuned_rows: Sequence[Row], *, where: tuple[str, str] = ("base", "tuned")
) -> dict[str, Any]:
    """What became of each item: four counts and the exact p-value of the change.

    Args:
        base_rows: graded predictions before.
        tuned_rows: graded predictions after, of the same items (split and id) in any order.
        where: the names that errors give to the two.

    Returns:
        `{n, both_right, gained, lost, both_wrong, p_value}`.

    Raises:
        UserInputError: the two hold different items, or a row is not as `score` needs it.
    """
    for rows, name in zip((base_rows, tuned_rows), where, strict=True):
        _check_rows(rows, where=name)
    base = {(row["split"], row["id"]): row["correct"] for row in base_rows}
    tuned = {(row["split"], row["id"]): row["correct"] for row in tuned_rows}
    if base.keys() != tuned.keys():
        raise UserInputError(_different_items(set(base), set(tuned), where))
    pairs = [(was_right, tuned[key]) for key, was_right in base.items()]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return {
        "n": len(pairs),
        "both_right": pairs.count((True, True)),
        "gained": gained,
        "lost": lost,
        "both_wrong": pairs.count((False, False)),
        "p_value": mcnemar_p(gained, lost),
    }


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: how likely so uneven a split of the changed items is by coin flips.

    p = min(1, 2 * sum_{k <= min(gained, lost)} C(m, k) / 2^m) with m = gained + lost (Q. McNemar,
    Psychometrika 12, 1947; the exact binomial form). Integers up to the last division: no overflow.

    >>> mcnemar_p(5, 0), mcnemar_p(3, 3)  # 2 / 2^5
    (0.0625, 1.0)
    """
    changed = gained + lost
    term = tail = 1  # C(m, 0)
    for k in range(1, min(gained, lost) + 1):
        term = term * (changed - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / (1 << changed))


def side_by_side(base: Row | None, tuned: Row | None, *, where: str = MAIN_SPLIT) -> dict[str, Any]:
    """Two scores of one split in one table: what report.json holds.

    Args:
        base: a value of `score(...)["splits"]`, or None where this model was not evaluated.
        tuned: the same, for the other model.
        where: the split's name, for errors.

    Returns:
        `{n, acc_base, low_base, high_base, acc_tuned, low_tuned, high_tuned, without_level, by_level,
        by_relation, mean_over_levels: {base, tuned, levels_counted}}`; cells of `by_level` and `by_relation`
        have the first seven keys. A model that was not evaluated has None.

    Raises:
        UserInputError: a level or relation holds other numbers of items before than after.
    """
    base, tuned = base or {}, tuned or {}
    table = _cell(base, tuned, where)
    table["without_level"] = (base or tuned).get("without_level", 0)
    for group in ("by_level", "by_relation"):
        cells, other = base.get(group, {}), tuned.get(group, {})
        keys = sorted({*cells, *other}, key=natural_key)
        both = bool(base and tuned)
        table[group] = {
            key: _cell(_of(cells, key, both), _of(other, key, both), f"{where}, {group} {key}")
            for key in keys
        }
    table["mean_over_levels"] = {
        "base": base.get("mean_over_levels"),
        "tuned": tuned.get("mean_over_levels"),
        "levels_counted": (base or tuned).get("levels_counted", []),
    }
    return table


def _of(cells: Row, key: str, both_evaluated: bool) -> Row:
    """A group's counts; a group that an evaluated model lacks has n = 0 there, which `_cell` will refuse."""
    return cells.get(key) or ({"n": 0} if both_evaluated else {})


def _cell(base: Row, tuned: Row, where: str) -> dict[str, Any]:
    sizes = {part["n"] for part in (base, tuned) if part}
    if len(sizes) > 1:
        raise UserInputError(
            Problem(
                what="the evaluations before and after disagree on how many items this holds",
                where=where,
                got=f"{base['n']} before, {tuned['n']} after",
                remedy="evaluate both models with the same recipe and the same levels.jsonl",
            )
        )
    cell: dict[str, Any] = {"n": sizes.pop() if sizes else 0}
    for name, part in (("base", base), ("tuned", tuned)):
        cell |= {
            f"acc_{name}": part.get("accuracy"),
            f"low_{name}": part.get("low"),
            f"high_{name}": part.get("high"),
        }
    return cell


def _score_split(rows: Sequence[Row]) -> dict[str, Any]:
    by_level = _score_groups(rows, "level")
    accuracies = [cell["accuracy"] for cell in by_level.values()]
    return {
        **_accuracy_of(rows),
        "without_level": sum(row.get("level") is None for row in rows),
        "by_level": by_level,
        "by_relation": _score_groups(rows, "relation"),
        "mean_over_levels": sum(accuracies) / len(accuracies) if accuracies else None,
        "levels_counted": [int(level) for level in by_level],
    }


def _score_groups(rows: Iterable[Row], field: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(field) is not None:
            groups.setdefault(str(row[field]), []).append(row)
    return {name: _accuracy_of(groups[name]) for name in sorted(groups, key=natural_key)}


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts P17 before P131.

    >>> sorted(["P131", "P17", "born in"], key=natural_key)
    ['P17', 'P131', 'born in']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else -1, part) for i, part in enumerate(parts)]


def _accuracy_of(rows: Sequence[Row]) -> dict[str, Any]:
    correct, n = sum(row["correct"] for row in rows), len(rows)
    low, high = wilson_interval(correct, n) or (None, None)
    return {"n": n, "correct": correct, "accuracy": correct / n if n else None, "low": low, "high": high}


def _check_rows(rows: Sequence[Row], *, where: str) -> None:
    problems: list[Problem] = []
    seen: set[tuple[str, str | int]] = set()
    for number, row in enumerate(rows, start=1):
        found = _row_problems(row, f"{where}:{number}")
        problems += found
        if found:
            continue
        key = (row["split"], row["id"])
        if key in seen:
            problems.append(
                Problem(what="this id occurs twice", where=f"{where}:{number}", got=repr(row["id"]))
            )
        seen.add(key)
    if problems:
        hidden = len(problems) - MAX_PROBLEMS_SHOWN
        more = [Problem(what=f"and {hidden} more problems like these", where=where)] if hidden > 0 else []
        raise UserInputError(*problems[:MAX_PROBLEMS_SHOWN], *more)


def _row_problems(row: Row, where: str) -> list[Problem]:
    problems = []
    for field, types in FIELD_TYPES.items():
        if not isinstance(row.get(field), types):
            allowed = " or ".join(kind.__name__ for kind in types)
            got = repr(row[field])[:80] if field in row else "nothing"
            problems.append(Problem(what=f"field {field!r}", where=where, got=got, allowed=allowed))
    level = row.get("level")
    if level is not None and (type(level) is not int or level not in LEVELS):
        allowed = f"{LEVELS[0]}..{LEVELS[-1]}, or left out"
        problems.append(Problem(what="field 'level'", where=where, got=repr(level)[:80], allowed=allowed))
    if not isinstance(row.get("relation"), str | None):
        allowed = "str, or left out"
        problems.append(
            Problem(what="field 'relation'", where=where, got=repr(row["relation"])[:80], allowed=allowed)
        )
    return problems


def _different_items(base: set[Any], tuned: set[Any], where: tuple[str, str]) -> Problem:
    parts = [
        f"{len(ids)} only in {name} (such as {min(str(id_) for _, id_ in ids)!r})"
        for ids, name in ((base - tuned, where[0]), (tuned - base, where[1]))
        if ids
    ]
    return Problem(
        what="the two evaluations hold different items, so they can't be compared",
        where=" and ".join(where),
        got="; ".join(parts),
        remedy="evaluate both models with the same recipe (sftcore evaluate RECIPE)",
    )
