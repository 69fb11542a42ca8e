"""What a study of text matching says: which arm with how many pairs, at what cost; from predictions alone.

In: a folder whose subfolders are run folders of task `matching`. Out: the content of the study's report.json.
Invariant: all runs were evaluated on the same pairs; two arms are compared at the same size and pair by pair,
and one is called better only where the 95 % interval of the difference leaves out 0 and no draws overlap.
Trade-off: an arm is its mode, prompt, reasons and adapter; runs of one arm that differ elsewhere (in a
learning rate) are kept apart by a suffix with those keys rather than averaged, at the price of longer names.
"""

from __future__ import annotations

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
from sftcore.evaluate.score import MAIN_SPLIT, score, wilson_interval
from sftcore.fsio import read_jsonl, read_object
from sftcore.run_recipe import read_run_recipe
from sftcore.study.run_folder import PREDICTIONS, SCORES, summarise_training
from sftcore.study.table import (
    Run,
    check_same_items,
    differing_keys,
    grouped,
    pairwise,
    read_table,
    run_folders,
    spread,
)
from sftcore.study.wording import flatten, format_setting, format_share

METRICS = "metrics.jsonl"
TUNED, BASE, FEW_SHOT = "tuned", "base", "fewshot"
NOT_ARMS = ("name", "run", "select.n", "select.draw", "matching.wording", "evaluate.few_shot")
NOT_RUN_STATE = "not run"
NOT_RUN = "not_run.json"  # in the folder of a run that a study left out, with the reason
REASONS = {"before": "reason before the label", "after": "label before the reason"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingRun(Run):
    """A run of text matching: `metrics` are `summarise_training` of its steps, `scores` hold `pairs`, too.

    Args:
        others: "base" and "fewshot" -> the same as `scores`, where evaluated.
    """

    others: Mapping[str, Mapping[str, Any]]

    @property
    def wording(self) -> int:
        """Number of the prompt's paraphrase."""
        return int(self.recipe.get("matching.wording", 0))


def is_matching_study(folder: Path) -> bool:
    """Whether the first run in a study's folder is one of text matching."""
    folders = run_folders(folder)
    return bool(folders) and read_run_recipe(folders[0]).get("task") == "matching"


def _read_run(path: Path) -> MatchingRun | str:
    if (path / NOT_RUN).is_file():
        return f"{NOT_RUN_STATE}: {read_object(path / NOT_RUN, 'reason')['reason']}"
    needed = (METRICS, PREDICTIONS.format(TUNED), SCORES.format(TUNED))
    if missing := [name for name in needed if not (path / name).is_file()]:
        return f"no {', '.join(missing)}"
    recipe = read_run_recipe(path)
    rows, scores = _evaluation(path, TUNED)
    training = summarise_training(read_jsonl(path / METRICS, appended=True)) or {}
    seen = training.get("num_samples", 0) // max(1, recipe.get("train", {}).get("epochs", 1))
    return MatchingRun(
        name=path.name,
        recipe=dict(flatten(recipe)),
        n=len(read_selection(path)) if (path / SELECTION).is_file() else seen,
        rows=rows,
        scores=scores,
        metrics=training,
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
        UserInputError: no finished run, or runs with other test pairs than the first.
    """
    table = read_table(folder, _read_run, needed="trained and evaluated")
    runs = table.runs
    check_same_items(runs, [MAIN_SPLIT])
    arms = name_arms(runs)
    ordered = sorted(runs, key=lambda r: (r.n, r.wording, r.name))
    cells_of = grouped(ordered, lambda run: (arms[run.name], run.n, run.wording))
    majority = float(runs[0].scores["pairs"]["majority_accuracy"])
    cells = [_cell(*key, group, majority) for key, group in sorted(cells_of.items())]
    comparisons = compare_arms(cells_of)
    sensitivity = prompt_sensitivity(cells)
    references = _references(runs, majority)
    return {
        "name": table.name,
        "model": ", ".join(sorted({_model_name(run.recipe) for run in runs})),
        "num_runs": len(runs),
        "unfinished": table.unfinished,
        "num_items": runs[0].scores["n"],
        "references": references,
        "cells": cells,
        "comparisons": comparisons,
        "sensitivity": sensitivity,
        "verdict": _verdict(cells, comparisons, sensitivity, references),
    }


def name_arms(runs: Sequence[MatchingRun]) -> dict[str, str]:
    """Run -> its arm in words; where runs of one arm differ in other keys, with those."""
    return {
        run.name: describe_arm(run.recipe, sorted(differing_keys([r.recipe for r in group], NOT_ARMS)))
        for group in grouped(runs, lambda run: describe_arm(run.recipe)).values()
        for run in group
    }


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
    accuracy = spread([run.scores["accuracy"] for run in runs])
    num_items, mean = runs[0].scores["n"], accuracy["mean"]
    low, high = wilson_interval(round(mean * num_items), num_items) or (None, None)
    tokens = fmean(run.metrics.get("num_tokens", 0) for run in runs)
    seconds = [run.metrics["seconds"] for run in runs if run.metrics.get("seconds") is not None]
    samples = fmean(run.metrics.get("num_samples", 0) for run in runs)
    points = 100 * (mean - majority)
    return {
        "arm": arm,
        "n": n,
        "wording": wording,
        "runs": [run.name for run in runs],
        "accuracy": accuracy,
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


def compare_arms(cells: Mapping[tuple[str, int, int], Sequence[MatchingRun]]) -> list[dict[str, Any]]:
    """Every two arms at each size `n`, both in their first wording: see `pairwise`."""
    sizes = sorted({n for _, n, wording in cells if wording == 0})
    return [
        {"n": n, **part}
        for n in sizes
        for part in pairwise({arm: runs for (arm, *size), runs in cells.items() if size == [n, 0]})
    ]


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
