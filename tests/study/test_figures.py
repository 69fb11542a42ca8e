"""What must hold for figures: the same bytes whatever a user's settings, counts as text, a bounded size."""

from __future__ import annotations

from typing import Any

import matplotlib

from sftcore.study.figures import accuracy_figure, levels_figure, loss_figure


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
    assert "$x^2$ $y_{: 12 facts" in figure and "a\\x1b\\x00b: 1 facts" in figure
