"""A run folder, parsed, checked and counted: the files of docs/design.md, as plain Python values.

In: RUN. Out: `RunFiles`, with recipe.yaml and whichever of `FILES` are there; counts of their rows.
Invariant: what comes out can be relied on: a damaged file, or a scores.json that doesn't follow from its
predictions.jsonl, is an error that names the file.
Trade-off: everything is read into memory and counted again rather than trusted: 1.6 s and 190 MB for a whole
report of 22,000 items before and after (two cores, matplotlib included).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftcore.data.selection_file import SELECTION, read_selection
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.score import LEVELS, natural_key, score
from sftcore.fsio import DAMAGED, read_jsonl, read_object
from sftcore.run_recipe import RECIPE, read_run_recipe

MODELS = ("base", "tuned")
METRICS = "metrics.jsonl"
PREDICTIONS, SCORES = "eval/{}/predictions.jsonl", "eval/{}/scores.json"
FILES = {  # file -> what a report shows of it
    "plan.json": "the plan",
    METRICS: "the loss curve",
    "environment.json": "the environment",
    "levels.jsonl": "the memory levels",
    "levels.manifest.json": "the probe's settings",
    SELECTION: "the selected facts",
    "eval/base/predictions.jsonl": "accuracy before",
    "eval/base/scores.json": "a second count of accuracy before",
    "eval/tuned/predictions.jsonl": "accuracy after",
    "eval/tuned/scores.json": "a second count of accuracy after",
}
OPTIONAL = (int, float, type(None))
FIELDS: dict[str, dict[str, Any]] = {  # what a report relies on; predictions are checked by `score`
    "plan.json": {"totals": dict},
    METRICS: {"step": int, "loss": (int, float), "lr": OPTIONAL, "elapsed_seconds": OPTIONAL},
    "levels.jsonl": {"level": LEVELS, "split": str},
    SELECTION: {"id": (str, int)},
}
SUMMED = ("num_samples", "num_packs", "num_tokens", "num_trained_tokens", "num_pad_tokens")
CHECKPOINTS = "checkpoints/step-*/COMMITTED"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What a run folder holds.

    Args:
        name: the recipe's name, else the folder's.
        recipe: the resolved recipe.
        contents: file (a key of `FILES`) -> parsed content; absent files are left out.
        scores: model ("base", "tuned") -> `score` of its predictions; a model not evaluated is left out.
    """

    name: str
    recipe: dict[str, Any]
    contents: dict[str, Any]
    scores: dict[str, dict[str, Any]]

    def rows(self, file: str) -> list[dict[str, Any]]:
        """Rows of a JSONL file; none where it is absent."""
        return list(self.contents.get(file, []))

    def mapping(self, file: str) -> dict[str, Any]:
        """Keys of a JSON file; none where it is absent."""
        return dict(self.contents.get(file, {}))

    def setting(self, section: str, key: str) -> Any:
        """A recipe's value, None where the recipe lacks it."""
        values = self.recipe.get(section)
        return values.get(key) if isinstance(values, dict) else None


def read_run(run: Path) -> RunFiles:
    """Parse every file of `FILES` that is there; the steps of a resumed run come once each, in order.

    Raises:
        UserInputError: no recipe.yaml there; a file is damaged; scores.json contradicts predictions.jsonl.
    """
    recipe = _object(read_run_recipe(run), str(run / RECIPE))
    contents = {file: _read_content(run, file) for file in FILES if (run / file).exists()}
    scores = {model: _checked_scores(run, contents, model) for model in MODELS if _evaluated(contents, model)}
    name = str(recipe.get("name") or run.resolve().name)
    return RunFiles(name=name, recipe=recipe, contents=contents, scores=scores)


def count_levels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Facts of each split in each level: split -> "0".."4" -> count; "train" and "test" come first."""
    order = {"train": 0, "test": 1}
    names = sorted({row["split"] for row in rows}, key=lambda name: (order.get(name, 2), name))
    counts = Counter((row["split"], row["level"]) for row in rows)
    return {name: {str(level): counts[name, level] for level in LEVELS} for name in names}


def count_selection(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Selected facts (or pairs) in all, by level and relation (or label); None without rows."""
    if not rows:
        return None
    return {
        "n": len(rows),
        "by_level": _count(rows, "level"),
        "by_relation": _count(rows, "relation"),
        "by_label": _count(rows, "label"),
    }


def _count(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    counts = Counter(str(row[key]) for row in rows if row.get(key) is not None)
    return dict(sorted(counts.items(), key=lambda item: natural_key(item[0])))


def summarise_training(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """First and last loss, sums of the counts, wall-clock seconds; None without rows."""
    steps = last_of_each_step(metrics)
    if not steps:
        return None
    known = [key for key in SUMMED if all(isinstance(row.get(key), int) for row in steps)]
    return {
        "num_steps": len(steps),
        "steps_done_twice": len(metrics) - len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        **{key: sum(row[key] for row in steps) for key in known},
        "seconds": steps[-1].get("elapsed_seconds"),
    }


def last_of_each_step(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row a step, in order: a run that resumed from step 50 writes the steps after it once more.

    >>> last_of_each_step([{"step": 1, "loss": 9}, {"step": 2, "loss": 8}, {"step": 1, "loss": 7}])
    [{'step': 1, 'loss': 7}, {'step': 2, 'loss': 8}]
    """
    by_step = {row["step"]: row for row in metrics}
    return [by_step[step] for step in sorted(by_step)]


def _object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a mapping of finite numbers and text, as a report can write it again."""
    if not isinstance(value, dict):
        got = type(value).__name__
        raise UserInputError(Problem(what="must be a mapping", where=where, got=got, remedy=DAMAGED))
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError) as error:
        what = f"holds a value that JSON has no word for: {error}"
        raise UserInputError(Problem(what=what, where=where, remedy=DAMAGED)) from error
    return value


def _read_content(run: Path, file: str) -> Any:
    path = run / file
    if path.suffix == ".json":
        content = _object(read_object(path), str(path))
        _check_fields(content, FIELDS.get(file, {}), str(path))
        return content
    rows = read_selection(run) if file == SELECTION else read_jsonl(path, appended=file == METRICS)
    for number, row in enumerate(rows, start=1):
        _check_fields(_object(row, f"{path}:{number}"), FIELDS.get(file, {}), f"{path}:{number}")
    if file == METRICS:
        check_steps(rows, path)
    return rows


def check_steps(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse metrics in which steps are missing: between others, or up to the newest checkpoint.

    Raises:
        UserInputError: naming the first gap.
    """
    steps = sorted({row["step"] for row in rows})
    saved = [int(file.parent.name.removeprefix("step-")) for file in path.parent.glob(CHECKPOINTS)]
    expected = range(steps[0], max([steps[-1], *saved]) + 1) if steps else range(1, max(saved, default=0) + 1)
    if len(steps) != len(expected):
        known = set(steps)
        first = next(step for step in expected if step not in known)
        what = f"lacks step {first} and {len(expected) - len(steps) - 1} more of {expected[-1]}"
        raise UserInputError(Problem(what=what, where=str(path), remedy=DAMAGED))


def _check_fields(row: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    for field, kind in fields.items():
        value = row.get(field)
        fits = type(value) is int and value in kind if isinstance(kind, range) else isinstance(value, kind)
        if not fits:
            got = repr(row[field])[:80] if field in row else "nothing"
            raise UserInputError(Problem(what=f"field {field!r}", where=where, got=got, remedy=DAMAGED))


def _evaluated(contents: Mapping[str, Any], model: str) -> bool:
    return PREDICTIONS.format(model) in contents


def _checked_scores(run: Path, contents: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Count the predictions again; what scores.json says must be the same."""
    predictions, scores = run / PREDICTIONS.format(model), run / SCORES.format(model)
    counted = score(contents[PREDICTIONS.format(model)], where=str(predictions))
    difference = _first_difference(contents.get(SCORES.format(model), counted), counted)
    if difference:
        raise UserInputError(
            Problem(
                what=f"{scores} doesn't follow from {predictions}",
                where=difference[0],
                got=f"{difference[1]} in scores.json, {difference[2]} counted from predictions.jsonl",
                remedy="run `sftcore evaluate` again; until then neither file can be trusted",
            )
        )
    return counted


def _first_difference(stored: Any, counted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key where `stored` lacks or contradicts what was counted; further keys are allowed."""
    if isinstance(counted, dict):
        if not isinstance(stored, dict):
            return key, stored, "a mapping"
        parts = (
            _first_difference(stored.get(name, "nothing"), value, f"{key}.{name}".lstrip("."))
            for name, value in counted.items()
        )
        return next((part for part in parts if part), None)
    if isinstance(counted, float) and isinstance(stored, int | float):
        return None if math.isclose(stored, counted, abs_tol=1e-9) else (key, stored, counted)
    return None if stored == counted else (key, stored, counted)
