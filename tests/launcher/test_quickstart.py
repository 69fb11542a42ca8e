"""The quickstart is the ordinary path, said in seven steps; here with a tiny model and a small recipe."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from sftcore.launcher import quickstart


def test_seven_steps_in_their_order_end_with_a_report(
    tiny_recipe, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    select = {"n": 4, "levels": [0, 1, 2, 3, 4], "balance": "none"}
    shipped = tmp_path / "recipes" / "quickstart.yaml"
    shipped.parent.mkdir()
    sources = {split: [{"format": "facts", "path": f"../{split}.jsonl"}] for split in ("train", "test")}
    shipped.write_text(yaml.safe_dump(tiny_recipe | {"select": select, "data": sources}))
    monkeypatch.setattr(quickstart, "RECIPE", shipped)
    monkeypatch.setattr(quickstart, "pull_model", lambda name: tiny_model_folder)
    quickstart.run_quickstart(Path("runs/first"), "a model")
    said = capsys.readouterr().out
    steps = re.findall(r"\[(\d)/7\] (\w+)", said)
    names = ["pull", "probe", "draw", "plan", "train", "evaluate", "report"]
    assert steps == [(str(number), name) for number, name in enumerate(names, 1)]
    assert "4 samples in " in said and "level 0" in said
    assert said.rstrip().endswith("runs/first/report.html") and Path("runs/first/report.html").is_file()
