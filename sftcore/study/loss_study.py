"""A study without selection (one's own chats or prompts): losses of its runs, on one page.

In: a folder of run folders with metrics.jsonl and, with data.valid, valid.jsonl. Out: the page's numbers, its
HTML, lines for the terminal.
Invariant: each loss is a row of a run's own file; the last row of a step counts, as after a resume.
Trade-off: runs are listed by the keys in which their recipes differ, and only the lowest loss on
data.valid is marked: without held-out samples nothing here says which run is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sftcore.data.selection_file import SELECTION
from sftcore.fsio import read_jsonl, read_object
from sftcore.run_recipe import read_run_recipe
from sftcore.study.figures import HEIGHT_INCHES, INK, RULE, WIDTH_INCHES, legend_label, page_style, svg_of
from sftcore.study.run_folder import SCORES, last_of_each_step
from sftcore.study.study_figures import ARM_COLOURS
from sftcore.study.table import Run, differing_keys, head_lines, read_table
from sftcore.study.wording import flatten, format_setting, format_share

ENDED = ("finished.json", "model", "adapter")  # any of them: training is over
NO_SETTINGS = ("name", "run")
MAX_NAMED = 6  # curves with a colour of their own; the others are grey


def is_loss_study(folder: Path) -> bool:
    """Whether no run of a study's folder drew its training data."""
    return not any(folder.glob(f"*/{SELECTION}"))


def losses_of(run: Path) -> dict[str, Any]:
    """`last_loss`, `lowest_valid_loss` and `lowest_valid_step` of a run; None where it has none."""
    steps, valid = (_rows(run / name) for name in ("metrics.jsonl", "valid.jsonl"))
    known = [row for row in valid if row["valid_loss"] is not None]  # null: it was not finite
    best = min(known, key=lambda row: (row["valid_loss"], row["step"]), default=None)
    return {
        "last_loss": steps[-1]["loss"] if steps else None,
        "lowest_valid_loss": best["valid_loss"] if best else None,
        "lowest_valid_step": best["step"] if best else None,
    }


def _rows(path: Path) -> list[Mapping[str, Any]]:
    return last_of_each_step(read_jsonl(path, appended=True)) if path.is_file() else []


def summarise_losses(folder: Path) -> dict[str, Any]:
    """Everything that the page says: the content of report.json.

    Raises:
        UserInputError: no run there has been trained.
    """
    table = read_table(folder, _read_run, needed="trained")
    recipes = [run.recipe for run in table.runs]
    axes = differing_keys(recipes, NO_SETTINGS, absent_differs=True)
    runs = [
        {"name": run.name, "settings": {key: run.recipe.get(key) for key in axes}, **run.metrics}
        for run in table.runs
    ]
    measured = [run for run in runs if run["lowest_valid_loss"] is not None]
    best = min(measured, key=lambda run: run["lowest_valid_loss"])["name"] if measured else None
    report = {
        "name": table.name,
        "model": " and ".join(dict.fromkeys(Path(str(recipe.get("model.path"))).name for recipe in recipes)),
        "num_runs": len(runs),
        "axes": axes,
        "runs": runs,
        "best": best,
        "unfinished": [*table.unfinished],
    }
    return {**report, "verdict": _verdict(report)}


def _read_run(run: Path) -> Run | str:
    steps = _rows(run / "metrics.jsonl")
    if not steps or not any((run / name).exists() for name in ENDED):
        return "not trained"
    file = run / SCORES.format("tuned")
    scores = read_object(file, "accuracy") if file.is_file() else {}
    metrics = {
        **losses_of(run),
        "num_steps": steps[-1]["step"],
        "accuracy": scores.get("accuracy"),
        "valid": [{"step": row["step"], "loss": row["valid_loss"]} for row in _rows(run / "valid.jsonl")],
    }
    return Run(name=run.name, recipe=dict(flatten(read_run_recipe(run))), scores=scores, metrics=metrics)


def _verdict(report: Mapping[str, Any]) -> list[str]:
    best = next((run for run in report["runs"] if run["name"] == report["best"]), None)
    if best is None:
        return [
            "No run has a loss on held-out samples (data.valid), so nothing here says which one is better."
        ]
    named = ", ".join(f"{key} {format_setting(value)}" for key, value in best["settings"].items())
    found = f"{best['lowest_valid_loss']:.4f} at step {best['lowest_valid_step']:,}"
    return [f"The lowest loss on the validation samples is {found}: {named or best['name']}."]


def loss_table(report: Mapping[str, Any]) -> str:
    """The runs as plain text, no trailing newline; * marks the lowest valid loss."""
    width = max(len(run["name"]) for run in report["runs"]) + 2
    lines = head_lines(report)
    lines.append(f"{'run':<{width}}{'last loss':>10}{'valid loss':>12}{'accuracy':>10}")
    for run in report["runs"]:
        mark = " *" if run["name"] == report["best"] else ""
        losses = f"{format_loss(run['last_loss']):>10}{format_loss(run['lowest_valid_loss']):>12}"
        lines.append(f"{run['name']:<{width}}{losses}{format_share(run['accuracy']):>10}{mark}")
    if report["unfinished"]:
        lines += ["", f"not finished: {', '.join(report['unfinished'])}"]
    return "\n".join(lines)


def format_loss(loss: float | None) -> str:
    """Four decimals, or a dash.

    >>> format_loss(1.23456), format_loss(None)
    ('1.2346', '-')
    """
    return "-" if loss is None else f"{loss:.4f}"


def valid_figure(runs: Sequence[Mapping[str, Any]], *, best: str) -> str:
    """Loss on the validation samples by step, a line a run; the lowest ones have colours.

    Args:
        runs: of the report.
        best: name of the run with the lowest loss, whose lowest point is marked.
    """
    drawn = sorted((run for run in runs if run["valid"]), key=lambda run: run["lowest_valid_loss"])
    with page_style():
        figure = Figure(figsize=(2 * WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for number, run in reversed(list(enumerate(drawn))):
            steps, losses = ([row[key] for row in run["valid"]] for key in ("step", "loss"))
            is_named = number < MAX_NAMED
            label = legend_label(f"{run['name']} (lowest)" if run["name"] == best else run["name"])
            look = {"color": ARM_COLOURS[number], "lw": 1.8, "label": label} if is_named else {"color": RULE}
            axes.plot(steps, losses, "-o", ms=3.5, **look)
        lowest = drawn[0]
        axes.plot(lowest["lowest_valid_step"], lowest["lowest_valid_loss"], "o", ms=9, mfc="none", mec=INK)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, handlelength=1.6)
        return svg_of(figure, "valid", "Loss on the validation samples by step, of each run")
