"""What must hold for figures: the same bytes whatever a user's settings, counts as text, a bounded size."""

from __future__ import annotations

import re
from typing import Any

import matplotlib

from sftcore.study.figures import accuracy_figure, levels_figure, loss_figure
from sftcore.study.loss_study import valid_figure
from sftcore.study.study_figures import arm_curves


def test_figures_do_not_depend_on_a_users_matplotlib_settings(fake: Any) -> None:
    histogram = {"train": {"0": 5, "4": 7}, "<b>": {}}
    block = fake.report()
    metrics = [{"step": i, "loss": 1 + 1 / i} for i in range(1, 2000)]
    plain = levels_figure(histogram), accuracy_figure(block, name="x"), loss_figure(metrics)
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "svg.hashsalt": None}):
        assert (levels_figure(histogram), accuracy_figure(block, name="x"), loss_figure(metrics)) == plain
        assert matplotlib.rcParams["font.size"] == 30
    assert "5 · 42 %" in plain[0] and "7 · 58 %" in plain[0] and "&lt;b&gt;: 0 facts" in plain[0]
    assert "n = 20" in plain[1] and "pattern" in plain[1]  # both levels are hatched
    assert "loss, mean of 4 steps" in plain[2] and "learning rate" not in plain[2]  # 1999 steps in 500 bins
    assert all(len(figure) < 60_000 for figure in plain)


def test_names_are_drawn_as_they_stand_and_never_as_formulas() -> None:
    figure = levels_figure({"$x^2$ $y_{": {"0": 5, "4": 7}, "a\x1b\x00b": {"1": 1}})
    assert "$x^2$ $y_{: 12 facts" in figure and "a\\x1b\\x00b: 1 fact" in figure


def test_a_legend_shows_names_that_begin_with_an_underscore() -> None:
    runs = [
        {
            "name": name,
            "valid": [{"step": 1, "loss": loss}],
            "lowest_valid_loss": loss,
            "lowest_valid_step": 1,
        }
        for name, loss in (("_best", 1.0), ("_other", 2.0), ("plain", 3.0))
    ]
    drawn = valid_figure(runs, best="_best")
    assert all(name in drawn for name in ("_best (lowest)", "_other", "plain"))
    part = {"mean": 0.5, "low": 0.4, "high": 0.6}
    cells = [{"arm": "_arm", "n": n, "accuracy": part} for n in (60, 120)]
    drawn = arm_curves(cells, references=[("_base", 0.3)], name="arms")
    assert "_arm" in drawn and "_base" in drawn


def test_learning_rates_are_plain_numbers() -> None:
    rows = [{"step": step, "loss": 2.0, "lr": 2e-5 * (5 - step) / 5} for step in range(5)]
    drawn = loss_figure(rows)
    assert re.search(r">0\.0000\d+<", drawn) and not re.search(r">\d[\d.]*e-\d+<", drawn)
