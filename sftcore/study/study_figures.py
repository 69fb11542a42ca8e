"""Figures of a study: train level x test level; accuracy over the size of the training set, by level or arm.

In: cells of the study's report.json. Out: SVG elements, as `figures` makes them.
Invariant: a cell of fewer than `FEW_ITEMS` items is hatched and never coloured; all maps of a page share one
colour scale, so that two of them can be compared by eye.
Trade-off: one lightness scale from the page's lowest to its highest accuracy: small differences show, but a
page's colours can't be compared with another page's. The numbers stand in the cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from sftcore.evaluate.score import FEW_ITEMS, LEVELS
from sftcore.study.figures import (
    HEIGHT_INCHES,
    INK,
    LEVEL_COLOURS,
    WIDTH_INCHES,
    legend_label,
    page_style,
    svg_of,
)
from sftcore.study.study_runs import DIVIDED, MIXED

ROWS = (*map(str, LEVELS), MIXED, DIVIDED)
COLOURS = LinearSegmentedColormap.from_list("levels", ["#f3f7fb", *LEVEL_COLOURS])
APART = 1.04  # from one lone point's size to the next one's, so that their bars stay apart
HALF_WIDTH_LETTERS = 60  # of a legend's line next to another
LIGHT_TEXT_FROM = 0.62  # of the scale: dark cells carry white numbers
CURVE_COLOURS = {
    **dict(zip(map(str, LEVELS), LEVEL_COLOURS, strict=True)),
    MIXED: "#D55E00",
    DIVIDED: "#009E73",
}
ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito
SET_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#999999")  # of several levels, but not of all
ARM_STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (6, 2)))
CURVE_STYLES = {"0": ":", "1": "--", "2": "-.", "3": (0, (6, 2)), "4": "-", MIXED: "-", DIVIDED: (0, (1, 1))}


def heat_map(cells: Sequence[Mapping[str, Any]], *, split: str, scale: tuple[float, float], name: str) -> str:
    """Accuracy by training level (rows) and test level (columns), and the mean over levels.

    Args:
        cells: of one variant and size.
        split: "test" or "ood".
        scale: accuracies at the lightest and the darkest colour.
        name: prefix of the figure's ids, unique on the page.
    """
    parts = {cell["level"]: cell["splits"][split] for cell in cells if split in cell["splits"]}
    rows = order_rows(parts)
    columns = sorted({level for part in parts.values() for level in part["by_level"]})
    with page_style():
        figure = Figure(figsize=(WIDTH_INCHES, 0.42 * len(rows) + 1.0), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(rows):
            for x, level in enumerate(columns):
                cell = parts[row]["by_level"][level]
                _draw_cell(axes, (x, y), cell["mean"], cell["n"], scale, is_diagonal=row == level)
            if parts[row]["mean_over_large_levels"]:
                _draw_cell(
                    axes, (len(columns) + 0.25, y), parts[row]["mean_over_large_levels"]["mean"], None, scale
                )
        counts = [f"level {c}\nn = {parts[rows[0]]['by_level'][c]['n']:,}" for c in columns]
        _finish_map(axes, rows, [*counts, "mean over\nlevels"], len(columns))
        return svg_of(figure, name, f"Accuracy by training level and test level, split {split}")


def order_rows(levels: Iterable[str]) -> list[str]:
    """Levels of training sets, each once: single ones, then mixed, then divided ones.

    >>> order_rows(["divided", "mixed 1-4", "2", "mixed", "0", "2"])
    ['0', '2', 'mixed', 'mixed 1-4', 'divided']
    """
    return sorted(set(levels), key=lambda row: (ROWS.index(row.partition(" ")[0]), row))


def _row_styles(cells: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Row -> colour and line; sets of several levels, but not of all, take theirs in turn."""
    rows = order_rows(cell["level"] for cell in cells)
    partial = [row for row in rows if row not in CURVE_COLOURS]
    colours = {row: SET_COLOURS[i % len(SET_COLOURS)] for i, row in enumerate(partial)} | CURVE_COLOURS
    return {row: (colours[row], CURVE_STYLES[row.partition(" ")[0]]) for row in rows}


def _draw_cell(
    axes: Axes,
    spot: tuple[float, int],
    share: float,
    n: int | None,
    scale: tuple[float, float],
    *,
    is_diagonal: bool = False,
) -> None:
    (x, y), is_few = spot, n is not None and n < FEW_ITEMS
    place = (share - scale[0]) / max(scale[1] - scale[0], 1e-9)
    box = Rectangle(
        (x - 0.47, y - 0.45),
        0.94,
        0.9,
        facecolor="none" if is_few else COLOURS(place),
        edgecolor="#cbd2d9" if is_few else "none",
        hatch="////" if is_few else None,
        lw=0,
    )
    axes.add_patch(box)
    if is_diagonal:
        axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor="none", edgecolor=INK, lw=1.3))
    colour = "white" if place > LIGHT_TEXT_FROM and not is_few else INK
    axes.text(x, y, f"{100 * share:.1f}", ha="center", va="center", color=colour, fontsize=10)


def _finish_map(axes: Axes, rows: Sequence[str], labels: Sequence[str], num_levels: int) -> None:
    axes.set_xlim(-0.55, num_levels + 0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([*range(num_levels), num_levels + 0.25], labels)
    axes.set_yticks(range(len(rows)), [f"level {row}" if row.isdigit() else row for row in rows])
    axes.set_ylabel("trained on")
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def size_curves(cells: Sequence[Mapping[str, Any]], *, split: str, base: float | None, name: str) -> str:
    """Mean over test levels by the number of training facts: a line a level, a band over its draws.

    Args:
        cells: of one variant.
        split: "test" or "ood".
        base: the base model's share, drawn as a line.
        name: prefix of the figure's ids, unique on the page.
    """
    with page_style():
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for row, style in _row_styles(cells).items():
            points = sorted(
                (cell["n"], cell["splits"][split]["mean_over_large_levels"])
                for cell in cells
                if cell["level"] == row and cell["splits"].get(split, {}).get("mean_over_large_levels")
            )
            if points:
                label = f"level {row}" if row.isdigit() else row
                _draw_curve(axes, label, style, points, place=_place_beside(row, "level", cells))
        if base is not None:
            axes.axhline(base, color=INK, lw=0.9, ls=(0, (1, 2)), label="base")
        _finish_curves(axes, cells, "training facts")
        figure.legend(loc="outside upper left", ncols=4, frameon=False, handlelength=2.4)
        return svg_of(figure, name, f"Accuracy by the number of training facts, split {split}")


def arm_curves(
    cells: Sequence[Mapping[str, Any]], *, references: Sequence[tuple[str, float]], name: str
) -> str:
    """Accuracy on pairs by the number of training pairs: a line an arm, a band over its draws.

    Args:
        cells: of the study's report.json, all of one wording.
        references: label and share of what needs no training, drawn as lines.
        name: prefix of the figure's ids, unique on the page.
    """
    with page_style():
        figure = Figure(figsize=(2 * WIDTH_INCHES, 1.15 * HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for number, arm in enumerate(dict.fromkeys(cell["arm"] for cell in cells)):
            points = sorted((cell["n"], cell["accuracy"]) for cell in cells if cell["arm"] == arm)
            style = (ARM_COLOURS[number % len(ARM_COLOURS)], ARM_STYLES[number % len(ARM_STYLES)])
            _draw_curve(axes, arm, style, points, place=_place_beside(arm, "arm", cells))
        for number, (label, share) in enumerate(references):
            axes.axhline(share, color=INK, lw=0.9, ls=(0, (1, 2 + 2 * number)), label=legend_label(label))
        _finish_curves(axes, cells, "training pairs")
        longest = max(len(str(label)) for label in axes.get_legend_handles_labels()[1])
        columns = 2 if longest <= HALF_WIDTH_LETTERS else 1
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=2.4)
        return svg_of(figure, name, "Accuracy by the number of training pairs")


def _finish_curves(axes: Axes, cells: Sequence[Mapping[str, Any]], items: str) -> None:
    axes.set_xscale("log")
    sizes = sorted({cell["n"] for cell in cells})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    if len(sizes) == 1:
        axes.set_xlim(sizes[0] / 1.5, 1.5 * sizes[0])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0, high))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.set_xlabel(items)
    axes.grid(axis="y")
    axes.tick_params(length=0)


def _place_beside(label: str, key: str, cells: Sequence[Mapping[str, Any]]) -> float:
    """Where a lone point stands among the lone points of its size: 0 in the middle.

    >>> [_place_beside(arm, "arm", [{"arm": "a", "n": 60}, {"arm": "b", "n": 60}]) for arm in "ab"]
    [-0.5, 0.5]
    """
    sizes = {name: {cell["n"] for cell in cells if cell[key] == name} for name in (c[key] for c in cells)}
    lone = [name for name, ns in sizes.items() if len(ns) == 1 and ns == sizes.get(label)]
    return lone.index(label) - (len(lone) - 1) / 2 if label in lone else 0.0


def _draw_curve(
    axes: Axes,
    label: str,
    style: tuple[str, Any],
    points: Sequence[tuple[int, Mapping[str, Any]]],
    *,
    place: float,
) -> None:
    """A line through the (size, accuracy) points, with a band; a lone point a bar, next to the others'."""
    colour, line = style
    shift = APART**place if len(points) == 1 else 1
    sizes, parts = [shift * size for size, _ in points], [part for _, part in points]
    lows, highs = [part["low"] for part in parts], [part["high"] for part in parts]
    means = [part["mean"] for part in parts]
    axes.plot(sizes, means, marker="o", ms=4, lw=1.8, color=colour, ls=line, label=legend_label(label))
    if len(points) == 1:
        axes.vlines(sizes, lows, highs, color=colour, alpha=0.5, lw=3)
    axes.fill_between(sizes, lows, highs, color=colour, alpha=0.22, lw=0)
