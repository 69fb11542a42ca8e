"""Figures of a report, as SVG text that can stand in the middle of an HTML page.

In: plain counts, shares and losses. Out: one `<svg>` element each, with text kept as text.
Invariant: the same input gives the same bytes; a figure's ids carry its name, and it refers to nothing
outside itself.
Trade-off: text is laid out for DejaVu Sans (comes with matplotlib, wider than most fonts) and drawn in the
reader's own font: labels fit, can be searched, and a figure costs 7 to 19 kB (drawn as outlines, 40 kB).
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from sftcore.amounts import counted, rate
from sftcore.display import inert
from sftcore.evaluate.score import FEW_ITEMS, LEVELS

WIDTH_INCHES = 5.3  # 382 units: a 10-unit label is 13 px in half a 1200 px page, 9.5 px on a phone
HEIGHT_INCHES = 3.6
INK, FAINT, RULE = "#1f2933", "#616e7c", "#e4e7eb"
BASE_COLOUR, TUNED_COLOUR = "#D55E00", "#0072B2"  # Okabe and Ito's palette, https://jfly.uni-koeln.de/color/
LEVEL_COLOURS = ("#c6d4e1", "#9dbcd8", "#6c9fc9", "#3579b1", "#0b4f8a")  # one hue, lightness falls steadily
MAX_POINTS = 600  # about one per drawn pixel; longer runs are averaged in bins
SMOOTHED_FROM_STEPS = 60
STYLE: dict[Any, object] = {
    "text.parse_math": False,  # names may hold $ signs
    "svg.fonttype": "none",
    "svg.hashsalt": "sftcore",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "hatch.color": "#cbd2d9",
    "hatch.linewidth": 0.8,
}


def levels_figure(histogram: Mapping[str, Mapping[str, int]]) -> str:
    """Facts per memory level, one panel a split, count and share above each bar.

    Args:
        histogram: split -> level ("0".."4") -> number of facts.
    """
    with page_style():
        figure = Figure(
            figsize=(WIDTH_INCHES, max(HEIGHT_INCHES, 1.2 * len(histogram))), layout="constrained"
        )
        panels = figure.subplots(len(histogram), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (split, counts) in zip(panels, histogram.items(), strict=True):
            _draw_level_bars(axes, split, [counts.get(str(level), 0) for level in LEVELS])
        panels[-1].set_xticks(list(LEVELS), [f"level {level}" for level in LEVELS])
        return svg_of(figure, "levels", "Number of facts in each memory level, by split")


def _draw_level_bars(axes: Axes, split: str, counts: Sequence[int]) -> None:
    total = sum(counts)
    axes.bar(list(LEVELS), counts, width=0.78, color=LEVEL_COLOURS)
    for level, count in zip(LEVELS, counts, strict=True):
        share = f"{count / total:.0%}".replace("%", " %") if total else "-"
        axes.annotate(
            f"{count:,} · {share}",
            (level, count),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_title(f"{split}: {counted(total, 'fact')}", loc="left", fontweight="bold", fontsize=10, pad=8)
    axes.set_ylim(0, max(1.0, 1.25 * max(counts)))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)


def accuracy_figure(block: Mapping[str, Any], *, name: str) -> str:
    """Accuracy before and after at each level and over all items, with 95 % intervals.

    Columns with fewer than `FEW_ITEMS` items are hatched.

    Args:
        block: a split of report.json (`sftcore.evaluate.score.side_by_side`).
        name: prefix of the figure's ids, unique on the page.
    """
    columns = [*block["by_level"].items(), ("all", block)]
    with page_style():
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        for x, (_, cell) in enumerate(columns):
            if cell["n"] < FEW_ITEMS:
                axes.axvspan(x - 0.42, x + 0.42, facecolor="none", edgecolor="#cbd2d9", hatch="////", lw=0)
        drawn = [
            _draw_whiskers(axes, [cell for _, cell in columns], model=model, shift=shift)
            for model, shift in (("base", -0.12), ("tuned", 0.12))
        ]
        labels = [key if key == "all" else f"level {key}" for key, _ in columns]
        counts = [f"n = {cell['n']:,}" for _, cell in columns]
        axes.set_xticks(range(len(columns)), [f"{a}\n{b}" for a, b in zip(labels, counts, strict=True)])
        axes.axvline(len(columns) - 1.5, color=FAINT, lw=0.8, ls=(0, (2, 3)))
        _finish_accuracy_axes(axes, num_columns=len(columns), top=max(drawn, default=0.0))
        return svg_of(figure, name, "Accuracy before and after training at each memory level")


def _draw_whiskers(axes: Axes, cells: Sequence[Mapping[str, Any]], *, model: str, shift: float) -> float:
    """Draw one model's dots and intervals; returns the highest bound (0 where nothing was drawn)."""
    points = [(x + shift, cell) for x, cell in enumerate(cells) if cell[f"acc_{model}"] is not None]
    if not points:
        return 0.0
    colour, marker, label = {
        "base": (BASE_COLOUR, "o", "before"),
        "tuned": (TUNED_COLOUR, "D", "after"),
    }[model]
    lows, middles, highs = ([cell[f"{key}_{model}"] for _, cell in points] for key in ("low", "acc", "high"))
    positions = [x for x, _ in points]
    axes.vlines(positions, lows, highs, color=colour, lw=1.6)
    axes.plot(positions, middles, marker, color=colour, ms=5.5, mew=0, label=label)
    return float(max(highs))


def _finish_accuracy_axes(axes: Axes, *, num_columns: int, top: float) -> None:
    axes.set_xlim(-0.55, num_columns - 0.45)
    axes.set_ylim(0, min(1.0, max(0.05, 1.05 * top)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


def loss_figure(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The exact loss of each step, its running mean in long runs, and the learning rate.

    Args:
        metrics: rows of metrics.jsonl (`step`, `loss`; `lr` where known), sorted by step.
    """
    bin_steps = -(-len(metrics) // MAX_POINTS)
    steps = _bin_means([float(row["step"]) for row in metrics], bin_steps)
    losses = _bin_means([float(row["loss"]) for row in metrics], bin_steps)
    rates = [row.get("lr") for row in metrics]
    with page_style():
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.subplots()
        _draw_losses(axes, steps, losses, bin_steps=bin_steps)
        if None not in rates:
            _draw_rates(axes, steps, _bin_means([float(rate or 0) for rate in rates], bin_steps))
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.set_ylim(0, 1.05 * max(max(losses), 1e-9))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=1.6)
        return svg_of(figure, "loss", "Training loss by step")


def _draw_losses(axes: Axes, steps: Sequence[float], losses: Sequence[float], *, bin_steps: int) -> None:
    each = "each step" if bin_steps == 1 else f"mean of {bin_steps} steps"
    if len(losses) < SMOOTHED_FROM_STEPS:
        axes.plot(steps, losses, "-o", color=TUNED_COLOUR, lw=1.6, ms=3, label=f"loss, {each}")
        return
    window = max(5, len(losses) // 20) | 1
    axes.plot(steps, losses, color="#9dbcd8", lw=0.9, label=f"loss, {each}")
    smooth = running_mean(losses, window)
    axes.plot(steps, smooth, color=TUNED_COLOUR, lw=2, label=f"mean of {window * bin_steps} steps")


def _draw_rates(axes: Axes, steps: Sequence[float], rates: Sequence[float]) -> None:
    right = axes.twinx()
    right.plot(steps, rates, color=FAINT, lw=1, ls=(0, (4, 3)), label="learning rate (right)")
    right.set_ylim(0, 1.05 * max(max(rates), 1e-12))
    right.yaxis.set_major_locator(MaxNLocator(4))
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    right.tick_params(length=0, labelcolor=FAINT)
    right.spines["left"].set_visible(False)


def legend_label(name: str) -> str:
    """A name as a legend shows it: matplotlib hides a label that begins with _, but not after a space.

    >>> legend_label("_draft"), legend_label("lr-1e-05")
    (' _draft', 'lr-1e-05')
    """
    return f" {name}" if name.startswith("_") else name


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values (odd), over fewer at the ends.

    >>> running_mean([1.0, 2.0, 6.0, 4.0], 3)
    [1.5, 3.0, 4.0, 5.0]
    """
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _bin_means(values: Sequence[float], size: int) -> list[float]:
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]


@contextmanager
def page_style() -> Iterator[None]:
    """matplotlib's own defaults (never a user's matplotlibrc) plus `STYLE`, until the block ends."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def svg_of(figure: Figure, name: str, title: str) -> str:
    """The figure as an element for an HTML page; `title` is read out by screen readers."""
    FigureCanvasSVG(figure)
    for text in figure.findobj(Text):
        text.set_text(inert(text.get_text()))  # of data's names: XML has no control characters
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return inline_svg(buffer.getvalue(), name=name, title=title)


def inline_svg(document: str, *, name: str, title: str) -> str:
    """An SVG document as an element for an HTML page.

    Prolog, namespaces and fonts go; ids, references and style rules are confined to this figure.
    """
    body = document[document.index("<svg") :]
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace("*{stroke", f"#{name} *{{stroke")
    opening = f'<svg id="{name}" role="img" aria-label="{html.escape(title)}" '
    body = re.sub(r'^<svg width="[^"]*" height="[^"]*" ', opening, body)
    return re.sub(r"\s*\n\s*", "\n", body)
