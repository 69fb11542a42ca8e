"""What a study of text matching says: which arm with how many pairs, at what cost; from predictions alone.

In: a folder whose subfolders are run folders of task `matching`. Out: the content of the study's report.json.
Invariant: all runs were evaluated on the same pairs; two arms are compared at the same size and pair by pair,
and one is called better only where the 95 % interval of the difference leaves out 0 and no draws overlap.
Trade-off: an arm is its mode, prompt, reasons and adapter; runs of one arm that differ elsewhere (in a
learning rate) are kept apart by a suffix with those keys rather than averaged, at the price of longer names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sftcore.amounts import counted
from sftcore.data.rationales import MIN_REASONED_PAIRS
from sftcore.data.selection_file import SELECTION, read_selection
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.score import MAIN_SPLIT, mean_interval, score, wilson_interval
from sftcore.fsio import read_jsonl, read_object
from sftcore.run_recipe import RECIPE, read_run_recipe
from sftcore.study.run_folder import PREDICTIONS, SCORES, summarise_training
from sftcore.study.wording import flatten, format_setting, format_share

METRICS = "metrics.jsonl"
TUNED, BASE, FEW_SHOT = "tuned", "base", "fewshot"
NOT_ARMS = ("name", "run", "select.n", "select.draw", "matching.wording", "evaluate.few_shot")
NOT_RUN_STATE = "not run"
NOT_RUN = "not_run.json"  # in the folder of a run that a study left out, with the reason
REASONS = {"before": "reason before the label", "after": "label before the reason"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingRun:
    """One finished run.

    Args:
        recipe: dotted key -> value.
        n: training pairs.
        right: id of a test pair -> whether the tuned model was right.
        scores: of the tuned model: `score`'s keys, and `pairs` as `pair_scores` gives it.
        training: `summarise_training` of its steps.
        others: "base" and "fewshot" -> the same as `scores`, where evaluated.
    """

    name: str
    recipe: Mapping[str, Any]
    n: int
    right: Mapping[Any, bool]
    scores: Mapping[str, Any]
    training: Mapping[str, Any]
    others: Mapping[str, Mapping[str, Any]]

    @property
    def accuracy(self) -> float:
        """Share of the test pairs."""
        return float(self.scores["accuracy"])

    @property
    def wording(self) -> int:
        """Number of the prompt's paraphrase."""
        return int(self.recipe.get("matching.wording", 0))


def is_matching_study(folder: Path) -> bool:
    """Whether the first run in a study's folder is one of text matching."""
    recipes = sorted(folder.glob(f"*/{RECIPE}"))
    return bool(recipes) and read_run_recipe(recipes[0].parent).get("task") == "matching"


def read_matching_runs(folder: Path) -> tuple[list[MatchingRun], dict[str, str]]:
    """The finished runs in `folder`, and the name of each other one with what it lacks.

    Raises:
        UserInputError: no finished run, or runs with other test pairs than the first.
    """
    runs, unfinished = [], {}
    for path in sorted(recipe.parent for recipe in folder.glob(f"*/{RECIPE}")):
        needed = (METRICS, PREDICTIONS.format(TUNED), SCORES.format(TUNED))
        missing = [name for name in needed if not (path / name).is_file()]
        if (path / NOT_RUN).is_file():
            unfinished[path.name] = f"{NOT_RUN_STATE}: {read_object(path / NOT_RUN, 'reason')['reason']}"
        elif missing:
            unfinished[path.name] = f"no {', '.join(missing)}"
        else:
            runs.append(_read_run(path))
    if not runs:
        remedy = "let at least one run be trained and evaluated"
        raise UserInputError(Problem(what="no finished run of a study", where=str(folder), remedy=remedy))
    for run in runs[1:]:
        if run.right.keys() != runs[0].right.keys():
            remedy = "evaluate all runs of a study on the same data.test"
            where = f"{runs[0].name} and {run.name}"
            what = "these runs were evaluated on different items"
            raise UserInputError(Problem(what=what, where=where, remedy=remedy))
    return runs, unfinished


def _read_run(path: Path) -> MatchingRun:
    recipe = read_run_recipe(path)
    rows, scores = _evaluation(path, TUNED)
    training = summarise_training(read_jsonl(path / METRICS, appended=True)) or {}
    seen = training.get("num_samples", 0) // max(1, recipe.get("train", {}).get("epochs", 1))
    return MatchingRun(
        name=path.name,
        recipe=dict(flatten(recipe)),
        n=len(read_selection(path)) if (path / SELECTION).is_file() else seen,
        right={row["id"]: row["correct"] for row in rows if row["split"] == MAIN_SPLIT},
        scores=scores,
        training=training,
        others={
            name: _evaluation(path, name)[1]
            for name in (BASE, FEW_SHOT)
            if (path / PREDICTIONS.format(name)).is_file()
        },
    )


def _evaluation(path: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a model's predictions; their scores, counted again, with what was noted of the pairs."""
    file = path / PREDICTIONS.format(name)
    rows = read_jsonl(file)
    noted = read_object(path / SCORES.format(name)).get("pairs", {}).get(MAIN_SPLIT)
    if noted is None:
        remedy = "run `sftcore evaluate` again"
        raise UserInputError(Problem(what="no scores of pairs", where=str(file.parent), remedy=remedy))
    return rows, score(rows, where=str(file)) | {"pairs": noted}


def summarise_matching(folder: Path) -> dict[str, Any]:
    """Everything that the study's page says, as JSON values.

    Raises:
        UserInputError: as `read_matching_runs`.
    """
    runs, unfinished = read_matching_runs(folder)
    arms = name_arms(runs)
    grouped: dict[tuple[str, int, int], list[MatchingRun]] = {}
    for run in sorted(runs, key=lambda r: (r.n, r.wording, r.name)):
        grouped.setdefault((arms[run.name], run.n, run.wording), []).append(run)
    majority = float(runs[0].scores["pairs"]["majority_accuracy"])
    cells = [_cell(*key, group, majority) for key, group in sorted(grouped.items())]
    comparisons = compare_arms(grouped)
    sensitivity = prompt_sensitivity(cells)
    references = _references(runs, majority)
    return {
        "name": folder.resolve().name,
        "model": ", ".join(sorted({_model_name(run.recipe) for run in runs})),
        "num_runs": len(runs),
        "unfinished": unfinished,
        "num_items": len(runs[0].right),
        "references": references,
        "cells": cells,
        "comparisons": comparisons,
        "sensitivity": sensitivity,
        "verdict": _verdict(cells, comparisons, sensitivity, references),
    }


def name_arms(runs: Sequence[MatchingRun]) -> dict[str, str]:
    """Run -> its arm in words; where runs of one arm differ in other keys, with those."""
    groups: dict[str, list[MatchingRun]] = {}
    for run in runs:
        groups.setdefault(describe_arm(run.recipe), []).append(run)
    return {
        run.name: describe_arm(run.recipe, _differing(group)) for group in groups.values() for run in group
    }


def _differing(runs: Sequence[MatchingRun]) -> list[str]:
    """Dotted keys, but for those of sizes, draws and wordings, in which the runs' recipes differ."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.recipe.items():
            values.setdefault(key, set()).add(format_setting(value))
    return sorted(key for key, found in values.items() if len(found) > 1 and key not in NOT_ARMS)


def describe_arm(recipe: Mapping[str, Any], differing: Iterable[str] = ()) -> str:
    """An arm in words.

    >>> describe_arm({"matching.mode": "generative", "matching.rationale": "before"})
    'generative, concise prompt, reason before the label'
    >>> describe_arm({"matching.mode": "encoder", "train.lr": 1e-05}, ["train.lr"])
    'encoder, train.lr 1e-05'
    """
    mode = str(recipe.get("matching.mode", "generative"))
    parts = [mode]
    if mode != "encoder":
        parts.append(f"{recipe.get('matching.prompt', 'concise')} prompt")
    if (reason := recipe.get("matching.rationale", "none")) in REASONS:
        parts.append(REASONS[reason])
    if recipe.get("matching.predict") == "generate":
        parts.append("by generation")
    if (kind := recipe.get("adapter.kind", "none")) != "none":
        parts.append(str(kind))
    for key in differing:
        value = _model_name(recipe) if key == "model.path" else format_setting(recipe.get(key))
        parts.append(value if key == "model.path" else f"{key} {value}")
    return ", ".join(parts)


def _model_name(recipe: Mapping[str, Any]) -> str:
    path = str(recipe.get("model.path", ""))
    return Path(path).name if path.startswith("/") else path


def _cell(arm: str, n: int, wording: int, runs: Sequence[MatchingRun], majority: float) -> dict[str, Any]:
    """One point of a curve: a mean over draws, what it cost, what it brought."""
    accuracies = [run.accuracy for run in runs]
    num_items = len(runs[0].right)
    mean = fmean(accuracies)
    low, high = wilson_interval(round(mean * num_items), num_items) or (None, None)
    tokens = fmean(run.training.get("num_tokens", 0) for run in runs)
    seconds = [run.training["seconds"] for run in runs if run.training.get("seconds") is not None]
    samples = fmean(run.training.get("num_samples", 0) for run in runs)
    points = 100 * (mean - majority)
    return {
        "arm": arm,
        "n": n,
        "wording": wording,
        "runs": [run.name for run in runs],
        "accuracy": {"mean": mean, "low": min(accuracies), "high": max(accuracies), "draws": accuracies},
        "items_low": low,
        "items_high": high,
        "unparsable": fmean(run.scores["pairs"]["unparsable"] for run in runs) / num_items,
        "predicted_same": fmean(run.scores["pairs"]["predicted_same"] for run in runs),
        "points_over_majority": points,
        "tokens_per_sample": tokens / samples if samples else None,
        "trained_tokens": tokens,
        "train_seconds": fmean(seconds) if seconds else None,
        "tokens_per_point": tokens / points if points > 0 else None,
        "is_too_small": any(reason in arm for reason in REASONS.values()) and n < MIN_REASONED_PAIRS,
    }


def compare_arms(grouped: Mapping[tuple[str, int, int], Sequence[MatchingRun]]) -> list[dict[str, Any]]:
    """Every two arms at each size, both in their first wording; paired by test pair.

    A pair's difference is the share of the first arm's draws that were right, minus the second's.

    Returns:
        `{n, first, second, difference, low, high, draws_overlap}`, shares; normal 95 % interval over the
        test pairs, which says nothing of the luck of the draws.
    """
    found = []
    sizes = sorted({n for _, n, wording in grouped if wording == 0})
    for n in sizes:
        arms = sorted({arm for arm, size, wording in grouped if (size, wording) == (n, 0)})
        for first, second in itertools.combinations(arms, 2):
            one, two = (_right_shares(grouped[arm, n, 0]) for arm in (first, second))
            differences = [one[item] - two[item] for item in one]
            middle, low, high = mean_interval(differences)
            draws = [[run.accuracy for run in grouped[arm, n, 0]] for arm in (first, second)]
            found.append(
                {
                    "n": n,
                    "first": first,
                    "second": second,
                    "difference": middle,
                    "low": low,
                    "high": high,
                    "draws_overlap": min(draws[0]) <= max(draws[1]) and min(draws[1]) <= max(draws[0]),
                }
            )
    return found


def _right_shares(runs: Sequence[MatchingRun]) -> dict[Any, float]:
    return {item: fmean(float(run.right[item]) for run in runs) for item in runs[0].right}


def prompt_sensitivity(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Arms and sizes that were trained in several wordings: accuracy of each, and how far apart they lie."""
    groups: dict[tuple[str, int], dict[int, float]] = {}
    for cell in cells:
        wordings = groups.setdefault((cell["arm"], cell["n"]), {})
        wordings[cell["wording"]] = cell["accuracy"]["mean"]
    return [
        {
            "arm": arm,
            "n": n,
            "by_wording": {str(wording): share for wording, share in sorted(shares.items())},
            "range": max(shares.values()) - min(shares.values()),
        }
        for (arm, n), shares in groups.items()
        if len(shares) > 1
    ]


def _references(runs: Sequence[MatchingRun], majority: float) -> list[dict[str, Any]]:
    """What needs no training: the larger class, the base model, the base model after solved examples.

    Prompts that most runs have come first.
    """
    found = [{"name": "larger class of the test set", "accuracy": majority, "unparsable": 0.0}]
    words = {BASE: "base model ({})", FEW_SHOT: "base model, {examples} solved examples ({})"}
    seen = set()
    count = Counter((describe_arm(run.recipe), run.wording) for run in runs)
    for run in sorted(runs, key=lambda r: (-count[describe_arm(r.recipe), r.wording], r.name)):
        for name, scores in run.others.items():
            examples = run.recipe.get("evaluate.few_shot", 0)
            arm = describe_arm({**run.recipe, "adapter.kind": "none"})  # which is not there yet
            arm += f", wording {run.wording}" if run.wording else ""
            text = words[name].format(arm, examples=examples)
            if text in seen:
                continue
            seen.add(text)
            unparsable = scores["pairs"]["unparsable"] / scores["n"]
            found.append({"name": text, "accuracy": scores["accuracy"], "unparsable": unparsable})
    return found


def _verdict(
    cells: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    sensitivity: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What the study says, by rule from its numbers."""
    best = max(cells, key=lambda cell: cell["accuracy"]["mean"])
    majority = references[0]["accuracy"]
    draws = len(best["runs"])
    sentences = [
        f"Best: {best['arm']}, {counted(best['n'], 'pair')}: {format_share(best['accuracy']['mean'])} "
        f"({draws} draw{'s' if draws > 1 else ''}); always saying the larger class gives "
        f"{format_share(majority)}."
    ]
    beating = [cell for cell in cells if cell["items_low"] > majority]
    if len(beating) < len(cells):
        sentences.append(
            f"{len(beating)} of {len(cells)} cells beat the larger class beyond chance (95 % interval over "
            "the test pairs)."
        )
    beyond = [part for part in comparisons if part["low"] > 0 or part["high"] < 0]
    clear = [part for part in beyond if not part["draws_overlap"]]
    for part in clear:
        ahead, other = ("first", "second") if part["low"] > 0 else ("second", "first")
        sentences.append(
            f"With {counted(part['n'], 'pair')}, {part[ahead]} is ahead of {part[other]} by "
            f"{100 * abs(part['difference']):.1f} points."
        )
    if len(beyond) > len(clear):
        sentences.append(
            f"Of {len(comparisons)} comparisons of two arms {len(beyond) - len(clear)} would count over the "
            "test pairs alone, but their draws overlap: more draws would have to show whether they hold."
        )
    if comparisons and not beyond:
        sentences.append("No two arms of one size are distinguished by these test pairs.")
    if sensitivity:
        widest = max(sensitivity, key=lambda part: part["range"])
        sentences.append(
            f"Paraphrasing the prompt moves the result by up to {100 * widest['range']:.1f} points "
            f"({widest['arm']}, {counted(widest['n'], 'pair')})."
        )
    return sentences
