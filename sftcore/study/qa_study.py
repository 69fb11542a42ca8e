"""What a study of memory levels says: cells, the diagonal, the best set; all from predictions and selections.

In: `StudyFiles`. Out: the content of the study's report.json.
Invariant: a cell is a mean over draws and shows how far apart they lie; every comparison is between sets of
the same size; an effect is called one only where its interval leaves out 0, and a set the best one only where
no draw of any other reaches its lowest.
Trade-off: intervals over items (normal, of paired differences) hold for these draws; with two draws a cell
their spread says little, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sftcore.amounts import counted
from sftcore.evaluate.score import FEW_ITEMS, LEVELS, score
from sftcore.study.run_folder import count_levels
from sftcore.study.study_runs import LevelRun, StudyFiles
from sftcore.study.table import grouped, interval, is_clear, right_shares, spread
from sftcore.study.wording import format_share

SPLITS = ("test", "ood")


def summarise_study(files: StudyFiles) -> dict[str, Any]:
    """Everything that the study's page says, as JSON values."""
    groups = grouped(files.runs, lambda run: (run.variant, run.n, run.level))  # draws of a cell
    cells = [_cell(runs) for runs in groups.values()]
    diagonal = diagonal_effects(files.runs)
    best = best_cell(cells)
    return {
        "name": files.name,
        "model": str(files.recipe.get("model", {}).get("path", "")).rsplit("/", 1)[-1],
        "num_runs": len(files.runs),
        "unfinished": dict(files.unfinished),
        "level_histogram": count_levels(files.levels) if files.levels else None,
        "probe": dict(files.probe) or None,
        "others": {name: _by_split(scores) for name, scores in files.others.items()},
        "drift_levels": sorted({run.drift_level for run in files.runs if run.drift_level is not None}),
        "cells": cells,
        "diagonal": diagonal,
        "best": best,
        "explained": explained_by_constant(cells),
        "by_relation": _by_relation(files, best),
        "verdict": [*verdict(cells, diagonal, best, files.others), *constant_verdict(cells)],
    }


def _cell(runs: Sequence[LevelRun]) -> dict[str, Any]:
    drifts = [run.drift for run in runs if run.drift is not None]
    return {
        "adapter": runs[0].adapter,
        "variant": runs[0].variant,
        "n": runs[0].n,
        "level": runs[0].level,
        "runs": [run.name for run in runs],
        "drift_nats": fmean(drifts) if drifts else None,
        "splits": {split: found for split in SPLITS if (found := _cell_split(runs, split))},
    }


def _cell_split(runs: Sequence[LevelRun], split: str) -> dict[str, Any] | None:
    scores = [run.scores["splits"].get(split) for run in runs]
    if not all(scores):
        return None
    means = [mean for part in scores if (mean := mean_over_large_levels(part)) is not None]
    by_level = {
        str(level): {
            "n": scores[0]["by_level"][str(level)]["n"],
            **spread([part["by_level"][str(level)]["accuracy"] for part in scores]),
        }
        for level in LEVELS
        if str(level) in scores[0]["by_level"]
    }
    return {
        "n": scores[0]["n"],
        "accuracy": spread([part["accuracy"] for part in scores]),
        "constant": _constant(runs, split),
        "mean_over_large_levels": spread(means) if means else None,
        "levels_counted": levels_counted(scores[0]),
        "by_level": by_level,
    }


def _constant(runs: Sequence[LevelRun], split: str) -> dict[str, Any] | None:
    """What each draw's most frequent answers get without a model, and what the models have over them.

    Returns:
        `mean_over_large_levels` and `accuracy` as of a cell, and `over`: the mean over items of the model's
        share of right answers over the draws, minus the rule's, with a normal 95 % interval.
    """
    if not all(split in run.constant for run in runs):
        return None
    scores = [score(run.constant[split])["splits"][split] for run in runs]
    means = [mean for part in scores if (mean := mean_over_large_levels(part)) is not None]
    differences: dict[Any, float] = {}
    for run in runs:
        right = {row["id"]: row["correct"] for row in run.constant[split]}
        for row in run.rows:
            if row["split"] == split:
                gain = (float(row["correct"]) - float(right[row["id"]])) / len(runs)
                differences[row["id"]] = differences.get(row["id"], 0.0) + gain
    return {
        "accuracy": spread([part["accuracy"] for part in scores]),
        "mean_over_large_levels": spread(means) if means else None,
        "over": interval(list(differences.values())),
    }


def levels_counted(part: Mapping[str, Any]) -> list[int]:
    """Test levels that a mean over levels weighs alike: those with `FEW_ITEMS` items, or all if none has.

    >>> levels_counted({"by_level": {"0": {"n": 290}, "1": {"n": 65}, "2": {"n": 3}}})
    [0, 1]
    """
    counts = {int(level): cell["n"] for level, cell in part["by_level"].items()}
    return sorted([level for level, n in counts.items() if n >= FEW_ITEMS] or counts)


def mean_over_large_levels(part: Mapping[str, Any]) -> float | None:
    """Unweighted, over `levels_counted`: a level of three items would count like one of three hundred.

    So this is another number than scores.json's `mean_over_levels`, which weighs every level with an item.
    """
    accuracies = [part["by_level"][str(level)]["accuracy"] for level in levels_counted(part)]
    return fmean(accuracies) if accuracies else None


def _by_split(scores: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("n", "accuracy", "low", "high", "by_level")
    return {
        split: {key: part[key] for key in keys} | {"mean_over_large_levels": mean_over_large_levels(part)}
        for split, part in scores["splits"].items()
        if split in SPLITS
    }


def diagonal_effects(runs: Sequence[LevelRun]) -> list[dict[str, Any]]:
    """Does training on level i serve test level i best? Paired by item, for each size and test level.

    An item's difference is its share of right answers over the draws trained on its own level, minus the
    share over the runs of the same size trained on the other single levels.

    Returns:
        `{variant, n, level, num_items, own, others, difference, low, high}`; test levels with fewer than
        `FEW_ITEMS` items, or without runs on either side, are left out.
    """
    effects = []
    for variant, n in dict.fromkeys((run.variant, run.n) for run in runs):
        same = [r for r in runs if (r.variant, r.n) == (variant, n) and r.level.isdigit()]
        for level in LEVELS:
            own = [run for run in same if run.level == str(level)]
            others = [run for run in same if run.level != str(level)]
            if own and others and (effect := _paired(own, others, level)):
                effects.append({"variant": variant, "n": n, "level": level, **effect})
    return effects


def _paired(own: Sequence[LevelRun], others: Sequence[LevelRun], level: int) -> dict[str, Any] | None:
    items = [row["id"] for row in own[0].rows if row["split"] == SPLITS[0] and row.get("level") == level]
    if len(items) < FEW_ITEMS:
        return None
    first, second = (right_shares(runs) for runs in (own, others))
    return {
        "num_items": len(items),
        "own": fmean(first[item] for item in items),
        "others": fmean(second[item] for item in items),
        **interval([first[item] - second[item] for item in items]),
    }


def best_cell(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The cell with the highest mean over levels in domain, and those that draws don't tell apart from it.

    Returns:
        the best cell's keys and `next`, the second; `rivals`: the cells of which a draw reaches the best's
        lowest one, smallest set first, of one size the better first; `is_clear`: there is none, and best and
        next have two draws or more. None where nothing was measured.
    """
    measured = [
        (cell["splits"]["test"]["mean_over_large_levels"], cell)
        for cell in cells
        if cell["splits"].get("test", {}).get("mean_over_large_levels")
    ]
    if not measured:
        return None
    (top, cell), *others = sorted(measured, key=lambda pair: -pair[0]["mean"])
    rivals = [_named(other) | {"mean": part["mean"]} for part, other in others if part["high"] >= top["low"]]
    num_draws = [len(part["draws"]) for part in (top, *(part for part, _ in others[:1]))]
    return {
        **_named(cell),
        "runs": cell["runs"],
        "mean_over_large_levels": top,
        "levels_counted": cell["splits"]["test"]["levels_counted"],
        "next": _named(others[0][1]) if others else None,
        "rivals": sorted(rivals, key=lambda rival: rival["n"]),
        "is_clear": bool(others) and not rivals and min(num_draws) > 1,
    }


def _named(cell: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe_set` needs of a cell."""
    return {key: cell[key] for key in ("adapter", "variant", "n", "level")}


def _by_relation(files: StudyFiles, best: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Accuracy of base, few-shot and the best set's first draw, by relation of the test split."""
    run = next((r for r in files.runs if best and r.name == best["runs"][0]), None)
    if run is None:
        return []
    tuned = run.scores["splits"]["test"]["by_relation"]
    others = {name: s["splits"].get("test", {}).get("by_relation", {}) for name, s in files.others.items()}
    return [
        {
            "relation": relation,
            "n": cell["n"],
            "best": cell["accuracy"],
            **{name: table.get(relation, {}).get("accuracy") for name, table in others.items()},
        }
        for relation, cell in tuned.items()
    ]


def explained_by_constant(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each set's gain over the constant answer in domain: what names the set, `difference, low, high, clear`.

    Intervals are over items, of so many sets at once: 95 % becomes 1 - 0.05 / sets (Bonferroni) in `clear`.
    """
    found = [
        (cell, constant["over"])
        for cell in cells
        if (constant := cell["splits"].get(SPLITS[0], {}).get("constant")) is not None
    ]
    return [{**_named(cell), **over, "clear": is_clear(over, comparisons=len(found))} for cell, over in found]


def constant_verdict(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many training sets get more than a rule without a model would."""
    found = explained_by_constant(cells)
    if not found:
        return []
    clear = sum(part["clear"] for part in found)
    parts = [cell["splits"].get(SPLITS[0], {}).get("constant") for cell in cells]
    constants = [part["accuracy"]["mean"] for part in parts if part]
    return [
        f"Always answering with the relation's most frequent training answer, without a model, gets "
        f"{format_share(min(constants))} to {format_share(max(constants))} of the items in domain. "
        f"{clear} of {len(found)} training sets are clearly above their own constant (95 %, corrected for "
        f"{len(found)} comparisons); the others can't be told from that rule."
    ]


def describe_set(cell: Mapping[str, Any]) -> str:
    """A training set in words.

    >>> describe_set({"n": 60, "level": "2", "variant": ""})
    '60 facts of level 2'
    >>> describe_set({"n": 240, "level": "mixed", "variant": "lora, train.lr 0.0002"})
    '240 facts of mixed levels (lora, train.lr 0.0002)'
    >>> describe_set({"n": 60, "level": "divided 3,4", "variant": ""})
    '60 facts of divided levels 3,4'
    """
    kind, _, levels = cell["level"].partition(" ")
    which = f"level {kind}" if kind.isdigit() else f"{kind} levels {levels}".rstrip()
    variant = f" ({cell['variant']})" if cell["variant"] else ""
    return f"{counted(cell['n'], 'fact')} of {which}{variant}"


def recommend(best: Mapping[str, Any]) -> list[str]:
    """Which set to take: the best, or the smallest that draws don't tell apart from it."""
    mean = format_share(best["mean_over_large_levels"]["mean"])
    levels, num_draws, rivals = best["levels_counted"], len(best["runs"]), best["rivals"]
    counted = f"{_plural(levels, 'test level')} {_listed([str(level) for level in levels])}"
    numbers = f"{mean} (mean over {counted}, {num_draws} {_plural(best['runs'], 'draw')})"
    named = [f"{describe_set(rival)} ({format_share(rival['mean'])})" for rival in rivals]
    unclear = f"The draws don't tell {describe_set(best)} apart from {_listed(named)}."
    if rivals and rivals[0]["n"] < best["n"]:
        return [
            f"For this model, train on {describe_set(rivals[0])}: {format_share(rivals[0]['mean'])}. "
            f"The highest mean is that of {describe_set(best)}, {numbers}, "
            "but fewer facts are not clearly worse.",
            unclear,
        ]
    sentences = [f"For this model, train on {describe_set(best)}: {numbers}."]
    if rivals:
        sentences.append(unclear)
    elif best["next"] and not best["is_clear"]:
        following = describe_set(best["next"])
        sentences.append(f"One draw is too few to tell it apart from {following}, the next best.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    """With commas and an "and".

    >>> [_listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])]
    ['a', 'a and b', 'a, b and c']
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), "".join(names[-1:]))))


def _plural(items: Sequence[Any], noun: str) -> str:
    return noun if len(items) == 1 else f"{noun}s"


def verdict(
    cells: Sequence[Mapping[str, Any]],
    diagonal: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
    others: Mapping[str, Any],
) -> list[str]:
    """What the study says, by rule from its numbers."""
    if best is None:
        return ["No test item has a memory level: there is nothing to compare."]
    sentences = recommend(best)
    base = others.get("base")
    if base:
        before = mean_over_large_levels(base["splits"]["test"])
        sentences.append(f"The base model has {format_share(before)} with the same prompt.")
    few = others.get("fewshot")
    if few:
        share = mean_over_large_levels(few["splits"]["test"])
        sentences.append(f"After solved examples, without training, it has {format_share(share)}.")
    if diagonal:
        up = sum(effect["low"] > 0 for effect in diagonal)
        down = sum(effect["high"] < 0 for effect in diagonal)
        sentences.append(
            f"Diagonal effect: of {len(diagonal)} pairs of size and test level, training on that level "
            f"served it better than the other levels in {up}, worse in {down}, no different in the rest "
            "(95 % intervals of paired differences)."
        )
    return sentences
