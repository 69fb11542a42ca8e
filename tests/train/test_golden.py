"""A golden curve: the losses of ten steps on a tiny model, as committed.

If a change moves them on purpose, say why in CHANGELOG and commit the new ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sftcore.fsio import read_jsonl

GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_ten_steps_give_the_committed_losses(tiny_recipe):
    recipe = tiny_recipe | {"name": "golden", "train": {"epochs": 3, "lr": 1e-2, "weight_decay": 0.1}}
    Path("golden.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "sftcore"), "train", "golden.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["loss"] for row in read_jsonl(Path("runs/golden/metrics.jsonl"))][:10]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = json.dumps([round(loss, 6) for loss in losses])
    assert losses == pytest.approx(golden, rel=1e-4), f"found {found}"
    assert losses[-1] < losses[0]
