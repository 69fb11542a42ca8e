"""A study run here: finished runs are skipped, a failed one costs only itself, common work is done once."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from launching import BIN, ENVIRONMENT, run
from tiny import write_lines
from warm import Process

from launcher.study import conclude, load_study, state_of, status_table, summarise
from launcher.whole_run import run_whole, too_few_reasons

ALL_LEVELS = [0, 1, 2, 3, 4]


def write_study(base: dict, **keys) -> str:
    Path("base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    Path("sizes.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", **keys}, sort_keys=False), encoding="utf-8"
    )
    return "sizes.yaml"


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = run(str(BIN / "sftcore"), "study", *arguments)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_an_arm_with_too_few_reasons_is_not_run_in_a_study_but_by_hand(tiny_recipe, caplog):
    texts = [{"sentence1": f"Ann {i}", "sentence2": f"Bob {i}", "label": i % 2} for i in range(130)]
    rows = [row | ({"rationale": "one"} if i < 120 else {}) for i, row in enumerate(texts)]
    write_lines(Path("pairs.jsonl"), rows)
    data = {"train": [{"format": "pairs", "path": "pairs.jsonl"}], "max_reject_fraction": 0.1}
    select = {"n": 99, "balance": "none"}
    base = tiny_recipe | {"task": "matching", "data": data, "select": select, "train": {"epochs": 1}}
    path = write_study(base, grid={"matching.rationale": ["none", "after"], "select.n": [99, 100]})
    read = load_study(Path(path))
    few, enough = read.runs[2:]
    assert [too_few_reasons(run.recipe) for run in read.runs[:2]] == ["", ""], (
        "the label alone may have fewer"
    )
    assert too_few_reasons(enough.recipe) == "" and state_of(few) == "waiting"
    why = "99 pairs with reasons, 100 are needed"
    assert run_whole(few.recipe, shared=Path("shared")) == f"not run: {why}"
    assert state_of(few) == "not run" and summarise(read)["runs"][2]["reason"] == why
    assert f"not run  {why}" in status_table(read) and not (few.recipe.run_folder / "metrics.jsonl").exists()
    conclude(read)  # it is no failure
    caplog.clear()
    assert "not run" not in run_whole(few.recipe)
    assert why in caplog.text and state_of(few) == "finished"
    write_lines(Path("pairs.jsonl"), rows[60:])
    assert too_few_reasons(enough.recipe) == "60 pairs with reasons, 100 are needed"


@pytest.mark.slow
def test_a_failed_run_costs_only_itself_and_a_second_call_does_what_is_missing(tiny_recipe):
    """Three of 16 facts can be drawn, 99 can't: that run fails, is told, and is tried again."""
    path = write_study(tiny_recipe, grid={"select.n": [4, 99, 6], "select.levels": [ALL_LEVELS]})
    assert study(path, "--dry-run").stdout.split() == [f"n-{n}_levels-0-1-2-3-4" for n in (4, 99, 6)]
    assert not Path("runs").exists(), "a dry run writes nothing"
    waiting = study(path, "--status")
    assert waiting.stdout.count("waiting") == 4 and waiting.returncode == 0
    done = study(path)
    assert done.returncode == 1 and "1 of 3 runs failed: n-99" in done.stderr, done.stderr[-3000:]
    folder = Path("runs/sizes")
    rows = json.loads((folder / "study.json").read_text())["runs"]
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"]
    assert [row["cell"]["select.n"] for row in rows] == [4, 99, 6] and rows[0]["n"] == 8
    runs = [folder / row["name"] for row in rows]
    levels = {(runs[i] / "levels.jsonl").read_bytes() for i in (0, 2)}
    assert len(levels) == 1 and len(list((folder / "shared").glob("levels-*/levels.jsonl"))) == 1
    assert "already evaluated" in (folder / "logs" / f"{runs[2].name}.log").read_text(), "base: only once"
    assert not (runs[0] / "checkpoints").exists() and (runs[0] / "model" / "config.json").exists()
    finished = (runs[0] / "finished.json").stat().st_mtime_ns
    again = study(path)
    assert again.returncode == 1 and "3 runs, 1 to do" in again.stderr
    assert (runs[0] / "finished.json").stat().st_mtime_ns == finished
    table = study(path, "--status").stdout
    assert "2 finished, 1 failed" in table and "exit code 2" in table


@pytest.mark.slow
def test_a_finished_run_of_other_data_is_neither_skipped_nor_overwritten(tiny_recipe):
    path = write_study(tiny_recipe, grid={"train.epochs": [1]})
    assert study(path).returncode == 0
    finished = Path("runs/sizes/epochs-1/finished.json")
    kept = json.loads(finished.read_text())
    del kept["recipe"]["matching"]["pooling"]  # as if written before there was such a key
    finished.write_text(json.dumps(kept))
    assert "1 runs, 0 to do" in study(path).stderr
    lines = Path("test.jsonl").read_text().splitlines()
    Path("test.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    done = study(path)
    assert done.returncode == 1 and "1 runs, 1 to do" in done.stderr
    log = Path("runs/sizes/logs/epochs-1.log").read_text()
    assert "finished with other data" in log and "delete the folder" in log


@pytest.mark.slow
def test_a_stop_signal_to_a_study_reaches_its_run_which_goes_on_later(tiny_recipe):
    long = tiny_recipe | {"checkpoint": {"save_every_steps": 1000}}
    path = write_study(long, grid={"train.epochs": [20]})
    process = Process([str(BIN / "sftcore"), "study", path], ENVIRONMENT)
    metrics = Path("runs/sizes/epochs-20/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped on request in epochs-20" in said, said
    assert "1 started" in study(path, "--status").stdout
    done = study(path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step" in Path("runs/sizes/logs/epochs-20.log").read_text()
