"""What a study found, on one page: a folder of runs -> report.html, report.json, lines for the terminal.

In: the run folders in it. Out: report.html (self-contained, no script), report.json (the same numbers).
Invariant: each number follows from predictions.jsonl, selection.jsonl, metrics.jsonl, valid.jsonl,
levels.jsonl and drift.json of the runs; the same folder gives the same bytes.
Trade-off: every predictions.jsonl is read and counted again instead of trusting scores.json; of 252 runs of
1,200 items that is 60 MB of JSON at about 200 bytes a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sftcore.amounts import counted
from sftcore.evaluate.score import FEW_ITEMS
from sftcore.fsio import atomic_file, write_json
from sftcore.study.figures import levels_figure
from sftcore.study.loss_study import (
    MAX_NAMED,
    format_loss,
    is_loss_study,
    loss_table,
    summarise_losses,
    valid_figure,
)
from sftcore.study.matching_study import NOT_RUN_STATE, is_matching_study, summarise_matching
from sftcore.study.qa_study import SPLITS, describe_set, summarise_study
from sftcore.study.report import ReportResult
from sftcore.study.study_figures import arm_curves, heat_map, size_curves
from sftcore.study.study_runs import read_study_runs
from sftcore.study.table import head_lines
from sftcore.study.templates import render
from sftcore.study.wording import (
    format_share,
)

MAX_LINES = 3  # of references in a figure; the table has them all
TITLES = {"test": "in domain", "ood": "out of domain"}


def write_study_report(folder: Path) -> ReportResult:
    """Read a study's runs; write report.html and report.json next to them.

    Raises:
        UserInputError: no finished run, or runs that can't be compared.
    """
    if is_matching_study(folder):
        report = summarise_matching(folder)
        page, table = render_matching(report), matching_table(report)
    elif is_loss_study(folder):
        report = summarise_losses(folder)
        page, table = render_losses(report), loss_table(report)
    else:
        report = summarise_study(read_study_runs(folder))
        page, table = render_study(report), study_table(report)
    html_path, json_path = folder / "report.html", folder / "report.json"
    write_json(json_path, report)
    with atomic_file(html_path) as handle:
        handle.write(page)
    return ReportResult(html_path=html_path, json_path=json_path, table=table)


def render_matching(report: Mapping[str, Any]) -> str:
    """The HTML page of a study of text matching."""
    cells = [cell for cell in report["cells"] if not cell["wording"]]
    references = [(part["name"], part["accuracy"]) for part in report["references"]]
    curves = arm_curves(cells, references=references[:MAX_LINES], name="arms") if cells else ""
    return render("matching.html", {"report": report, "curves": Markup(curves)})


def render_losses(report: Mapping[str, Any]) -> str:
    """The HTML page of a study without selection."""
    curves = valid_figure(report["runs"], best=report["best"]) if report["best"] else ""
    values = {"report": report, "curves": Markup(curves), "max_named": MAX_NAMED}
    return render("losses.html", values, loss=format_loss)


def matching_table(report: Mapping[str, Any]) -> str:
    """The main numbers of a study of text matching as plain text, no trailing newline."""
    lines = head_lines(report)
    for cell in report["cells"]:
        wording = f", wording {cell['wording']}" if cell["wording"] else ""
        name = f"{cell['arm']}{wording}, {counted(cell['n'], 'pair')}"
        lines.append(f"{name:<72}{format_share(cell['accuracy']['mean'])}")
    lines += [f"{part['name']:<72}{format_share(part['accuracy'])}" for part in report["references"]]
    left_out = {name: why for name, why in report["unfinished"].items() if why.startswith(NOT_RUN_STATE)}
    lines += [f"{name}: {why}" for name, why in left_out.items()]
    if waiting := report["unfinished"].keys() - left_out.keys():
        lines += ["", f"not finished: {', '.join(sorted(waiting))}"]
    return "\n".join(lines)


def render_study(report: Mapping[str, Any]) -> str:
    """The HTML page of a study of memory levels."""
    values = {
        "report": report,
        "figures": {name: (title, Markup(svg)) for name, (title, svg) in _figures(report).items()},
        "few_items": FEW_ITEMS,
        "splits": {
            split: TITLES[split] for split in SPLITS if any(split in c["splits"] for c in report["cells"])
        },
    }
    return render("study.html", values, set=describe_set)


def _figures(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> (title, SVG): levels, then curves, then a map for each variant, size and split."""
    figures = {}
    if report["level_histogram"]:
        title = "What the base model remembers"
        figures["levels"] = (title, levels_figure(report["level_histogram"]))
    cells = report["cells"]
    scale = _scale(cells)
    for number, variant in enumerate(dict.fromkeys(cell["variant"] for cell in cells)):
        same = [cell for cell in cells if cell["variant"] == variant]
        how = f", {variant}" if variant else ""
        for split in SPLITS:
            if any(split in cell["splits"] for cell in same):
                base = report["others"].get("base", {}).get(split, {}).get("mean_over_large_levels")
                name = f"curve-{number}-{split}"
                title = f"Size of the training set, {TITLES[split]}{how}"
                figures[name] = (title, size_curves(same, split=split, base=base, name=name))
        for n in sorted({cell["n"] for cell in same}):
            for split in SPLITS:
                chosen = [cell for cell in same if cell["n"] == n and split in cell["splits"]]
                if chosen:
                    name = f"map-{number}-{n}-{split}"
                    title = f"{counted(n, 'training fact')}, {TITLES[split]}{how}"
                    figures[name] = (title, heat_map(chosen, split=split, scale=scale, name=name))
    return figures


def _scale(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Lowest and highest accuracy of the cells that are coloured."""
    shares = [
        part["mean"]
        for cell in cells
        for split in cell["splits"].values()
        for part in split["by_level"].values()
        if part["n"] >= FEW_ITEMS
    ]
    return (min(shares), max(shares)) if shares else (0.0, 1.0)


def study_table(report: Mapping[str, Any]) -> str:
    """The study's main numbers as plain text, no trailing newline."""
    lines = head_lines(report)
    width = 4 + max(len(describe_set(cell)) for cell in report["cells"])
    for cell in report["cells"]:
        parts = [
            f"{TITLES[split]} {format_share(part['mean_over_large_levels']['mean'])}"
            for split, part in cell["splits"].items()
            if part["mean_over_large_levels"]
        ]
        lines.append(f"{describe_set(cell):<{width}}{', '.join(parts)}")
    if report["unfinished"]:
        lines += ["", f"not finished: {', '.join(report['unfinished'])}"]
    return "\n".join(lines)
