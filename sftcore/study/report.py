"""What a run did, on one page: RUN -> report.html, report.json, a table for the terminal.

In: the files of a run folder (docs/design.md); all but recipe.yaml may be absent. Out: report.html
(self-contained, no script), report.json (the same numbers for programs), plain text.
Invariant: each number names the file it came from; what the page says of a change follows from the counts by
rule; the same folder gives the same bytes.
Trade-off: p-values and intervals cover the choice of test items only. One run can't show the luck of its
training draw; the page says so, and a study of several draws costs that many times more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sftcore.data.selection_file import SELECTION
from sftcore.evaluate.constant import constant_rows, over_constant
from sftcore.evaluate.score import FEW_ITEMS, MAIN_SPLIT, paired_change, score, side_by_side
from sftcore.fsio import atomic_file, write_json
from sftcore.run_recipe import RECIPE
from sftcore.stages.stage import maker_of
from sftcore.study.figures import accuracy_figure, levels_figure, loss_figure
from sftcore.study.run_folder import (
    FILES,
    MODELS,
    PREDICTIONS,
    RunFiles,
    count_levels,
    count_selection,
    last_of_each_step,
    read_run,
    summarise_training,
)
from sftcore.study.templates import render
from sftcore.study.wording import (
    describe,
    flatten,
    format_relation,
    list_notes,
    terminal_table,
)

QUOTAS = {"gained": 3, "lost": 2, "both right": 1, "both wrong": 2, "right": 4, "wrong": 4}
NUM_EXAMPLES = 8
OUTCOMES = {
    (False, True): "gained",
    (True, False): "lost",
    (True, True): "both right",
    (False, False): "both wrong",
}
SOURCES = (  # key of report.json, file, how it is counted
    ("acc_{}", PREDICTIONS, "correct rows / rows of split test; low and high: 95 % Wilson interval"),
    ("by_level.*.acc_{}", PREDICTIONS, "the same among the rows of one level"),
    ("by_relation.*.acc_{}", PREDICTIONS, "the same among the rows of one relation"),
    ("mean_over_levels.{}", PREDICTIONS, "sum of the levels' accuracies / number of levels that have rows"),
    ("splits.*.acc_{}", PREDICTIONS, "as acc, among the rows of each split"),
    ("paired_change", "eval/*/predictions.jsonl", "rows before and after, joined by id; exact McNemar test"),
    (
        "constant",
        SELECTION,
        "items of split test that their relation's most frequent selected answer answers",
    ),
    ("level_histogram", "levels.jsonl", "rows of each level in each split"),
    ("probe", "levels.manifest.json", "as written there"),
    ("selection", SELECTION, "rows, and rows of each level and relation, or label"),
    ("training", "metrics.jsonl", "one row a step (the last one written): first, last, sums"),
    ("plan", "plan.json", "totals, as written there"),
    ("environment", "environment.json", "as written there"),
    ("settings", RECIPE, "as written there"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportResult:
    """Where the report lies, and the plain-text table that a launcher prints."""

    html_path: Path
    json_path: Path
    table: str


def write_report(run: Path) -> ReportResult:
    """Read a run folder; write RUN/report.html and RUN/report.json.

    Raises:
        UserInputError: no recipe.yaml there, a damaged file, or two files that contradict each other.
    """
    files = read_run(run)
    report = summarise(files)
    page = render_page(report, files)
    html_path, json_path = run / "report.html", run / "report.json"
    write_json(json_path, report)
    with atomic_file(html_path) as handle:
        handle.write(page)
    return ReportResult(html_path=html_path, json_path=json_path, table=terminal_table(report))


def summarise(files: RunFiles) -> dict[str, Any]:
    """Everything that the page says, as JSON values: the content of report.json.

    The top level holds the keys of split "test" (`side_by_side` and `paired_change`); `splits` has the same
    for every split, `ood` repeats that one. A part whose file is absent is None.
    """
    splits = {split: _compare_split(files, split) for split in _split_names(files)}
    report = {
        "name": files.name,
        "model": _model_name(files),
        **(splits.get(MAIN_SPLIT) or {**side_by_side(None, None), "paired_change": None}),
        "constant": _constant(files),
        "ood": splits.get("ood"),
        "splits": splits,
        "level_histogram": count_levels(files.rows("levels.jsonl")) or None,
        "probe": files.contents.get("levels.manifest.json"),
        "selection": count_selection(files.rows(SELECTION)),
        "training": summarise_training(files.rows("metrics.jsonl")),
        "plan": files.mapping("plan.json").get("totals"),
        "environment": files.contents.get("environment.json"),
        "settings": files.recipe,
        "missing": [file for file in FILES if file not in files.contents],
        "sources": _sources(files),
    }
    return report | {"verdict": describe(report), "notes": list_notes(report, files)}


def _split_names(files: RunFiles) -> list[str]:
    names = {split for scores in files.scores.values() for split in scores["splits"]}
    return sorted(names, key=lambda split: (split != MAIN_SPLIT, split))


def _rows_of(files: RunFiles, model: str, split: str) -> list[dict[str, Any]]:
    return [row for row in files.rows(PREDICTIONS.format(model)) if row["split"] == split]


def _compare_split(files: RunFiles, split: str) -> dict[str, Any]:
    both = [files.scores[model]["splits"].get(split) if model in files.scores else None for model in MODELS]
    change = None
    if len(files.scores) == len(MODELS):
        base, tuned = (_rows_of(files, model, split) for model in MODELS)
        change = paired_change(base, tuned, where=(PREDICTIONS.format("base"), PREDICTIONS.format("tuned")))
    return {**side_by_side(*both, where=f"eval/*/predictions.jsonl, split {split}"), "paired_change": change}


def _constant(files: RunFiles) -> dict[str, Any] | None:
    """What the selection's most frequent answers get on split test, and the trained model has over them."""
    tuned = _rows_of(files, "tuned", MAIN_SPLIT)
    found = constant_rows(files.rows(SELECTION), tuned)
    if found is None:
        return None
    counted = score(found, where=SELECTION)["splits"][MAIN_SPLIT]
    return {**counted, "over": over_constant(found, tuned)}


def _sources(files: RunFiles) -> dict[str, str]:
    """Key of report.json -> the file its numbers came from, for the files that are there."""
    found: dict[str, str] = {}
    for key, file, _ in SOURCES:
        for model in MODELS if "{}" in key else MODELS[:1]:
            path = file.format(model)
            there = len(files.scores) == len(MODELS) if "*" in path else path in {RECIPE, *files.contents}
            found |= {key.format(model): path} if there else {}
    return found


def _model_name(files: RunFiles) -> str:
    """The model as people call it: a hub name as it is, the last part of a folder's absolute path."""
    path = str(files.setting("model", "path") or "unknown model")
    return Path(path).name if path.startswith("/") else path


def pick_examples(
    base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Up to eight items with their predictions, `QUOTAS` by outcome, evenly spaced over the rows of each.

    Args:
        base: graded rows of one split before; may be empty.
        tuned: graded rows of the same items after, or empty.

    Returns:
        `{outcome, prompt, accepted, tags, base, tuned}`; the last two are rows, or None if not evaluated.
    """
    before, after = ({row["id"]: row for row in rows} for rows in (base, tuned))
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in QUOTAS}
    for key, row in (before or after).items():
        pair = {"base": before.get(key), "tuned": after.get(key)}
        outcome = _outcome_of(*pair.values())
        level = row.get("level")
        tags = [format_relation(row.get("relation") or ""), None if level is None else f"level {level}"]
        outcomes[outcome].append(
            {
                "outcome": outcome,
                "prompt": row["prompt"],
                "accepted": [str(answer) for answer in row.get("answers") or [row.get("label", "-")]],
                "tags": [tag for tag in tags if tag],
                **pair,
            }
        )
    takes = {name: min(quota, len(outcomes[name])) for name, quota in QUOTAS.items()}
    for name, found in outcomes.items():  # fill up with what there is
        takes[name] += min(NUM_EXAMPLES - sum(takes.values()), len(found) - takes[name])
    return [example for name, found in outcomes.items() for example in _evenly_spaced(found, takes[name])]


def _outcome_of(base: Mapping[str, Any] | None, tuned: Mapping[str, Any] | None) -> str:
    if base and tuned:
        return OUTCOMES[base["correct"], tuned["correct"]]
    return "right" if (base or tuned or {})["correct"] else "wrong"


def _evenly_spaced(items: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def render_page(report: Mapping[str, Any], files: RunFiles) -> str:
    """The HTML page: report.html filled with `report`."""
    shown = next((split for split, block in report["splits"].items() if block["n"]), MAIN_SPLIT)
    rows = [_rows_of(files, model, shown) for model in MODELS]
    values = {
        "report": report,
        "figures": {name: Markup(svg) for name, svg in _figures(report, files).items()},
        "examples": pick_examples(*rows),
        "examples_split": shown,
        "sections": _setting_sections(files.recipe),
        "missing": [(file, FILES[file], f"sftcore {maker_of(file)}") for file in report["missing"]],
        "sources": [(key, file, _how(key)) for key, file in report["sources"].items()],
        "few_items": FEW_ITEMS,
    }
    return render("report.html", values)


def _figures(report: Mapping[str, Any], files: RunFiles) -> dict[str, str]:
    """Every figure that the folder has numbers for, by name; "accuracy-test" is one a split with levels."""
    figures = {}
    if report["level_histogram"]:
        figures["levels"] = levels_figure(report["level_histogram"])
    for number, (split, block) in enumerate(report["splits"].items()):
        if block["by_level"]:
            figures[f"accuracy-{split}"] = accuracy_figure(block, name=f"accuracy{number}")
    if report["training"]:
        figures["loss"] = loss_figure(last_of_each_step(files.rows("metrics.jsonl")))
    return figures


def _how(key: str) -> str:
    """How a number of report.json is counted."""
    return next(how for name, _, how in SOURCES if key in {name.format(model) for model in MODELS})


def _setting_sections(recipe: Mapping[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    """Recipe keys by top-level section; single values come first, under "run"."""
    alone = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    nested = {key: flatten(value) for key, value in recipe.items() if isinstance(value, dict)}
    return {"run": flatten(alone), **nested}
