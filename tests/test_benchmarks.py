"""The GPU benchmark runs whole on small shapes, so that a card's minutes aren't spent on its mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results_page import page

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_small_shapes(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    states = {(row["section"], row.get("backend", row.get("head"))): row["state"] for row in report["rows"]}
    assert states["attention", "sdpa_docs"] == "ok"
    assert states["attention", "flash_attn"] == "refused"
    assert states["head", "ours"] == states["head", "full logits"] == "ok"
    steps = [row for row in report["rows"] if row["section"] in ("step", "lever")]
    assert {row["deepspeed"] for row in steps} == {"zero1", "zero2", "zero3", "plain"}
    assert not [row for row in report["rows"] if row["state"] == "failed"]
    assert all(row["tokens_per_second"] > 0 for row in steps if row["state"] == "ok")
    text = page(report, None)
    assert "| zero3 |" in text and "refused" in text


def test_what_was_not_measured_has_no_numbers_on_the_page():
    text = page(None, None)
    assert "Not measured yet" in text and "python -m benchmarks.gpu" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]
