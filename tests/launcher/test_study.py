"""A study run here: finished runs are skipped, a failed one costs only itself, common work is done once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from launching import BIN, ENVIRONMENT, run
from tiny import write_lines
from warm import Process

from sftcore.errors import RankLost, SftError, StoppedOnRequest, UserInputError
from sftcore.fsio import folder_lock, read_jsonl
from sftcore.launcher.notice import notice_seconds
from sftcore.launcher.slurm import Job, Resources
from sftcore.launcher.study import conclude, load_study, state_of, status_table, submit_study, summarise
from sftcore.launcher.ways_in import Machines, train_by_ranks
from sftcore.stages.whole_run import run_whole, too_few_reasons

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


def test_a_sweep_on_ones_own_data_ends_with_losses_and_a_page(tiny_recipe):
    """No facts and no selection: it used to have neither page nor numbers."""
    rows = [{"prompt": f"Q {i}: ", "completion": f"answer {i % 3}"} for i in range(16)]
    write_lines(Path("own.jsonl"), rows[:12])
    write_lines(Path("held.jsonl"), rows[12:])
    source = {"format": "jsonl"}
    data = {"train": [source | {"path": "own.jsonl"}], "valid": [source | {"path": "held.jsonl"}]}
    base = tiny_recipe | {"data": data, "train": {"epochs": 3}}
    read = load_study(Path(write_study(base, grid={"train.lr": [1e-2, 1e-4]})))
    for one in read.runs:
        run_whole(one.recipe)
    conclude(read)
    found = json.loads(Path("runs/sizes/study.json").read_text())["runs"]
    report = json.loads(Path("runs/sizes/report.json").read_text())
    for row, one in zip(found, read.runs, strict=True):
        valid = [x["valid_loss"] for x in read_jsonl(one.recipe.run_folder / "valid.jsonl")]
        assert len(valid) == 3 and row["lowest_valid_loss"] == min(valid)
        assert row["last_loss"] == read_jsonl(one.recipe.run_folder / "metrics.jsonl")[-1]["loss"]
        assert f"{row['last_loss']:.4f}{row['lowest_valid_loss']:>9.4f}" in status_table(read)
    best = min(found, key=lambda row: row["lowest_valid_loss"])
    assert report["best"] == best["name"] and report["axes"] == ["train.lr"]
    assert {row["settings"]["train.lr"] for row in report["runs"]} == {1e-2, 1e-4}
    page = Path("runs/sizes/report.html").read_text()
    assert page.count('<svg id="valid"') == 1 and page.count(">lowest</span>") == 1 and "http" not in page
    for one in read.runs:
        (one.recipe.run_folder / "valid.jsonl").unlink()
    conclude(read)
    assert "nothing here says which one is better" in Path("runs/sizes/report.html").read_text()


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
    (folder / "report.html").unlink()
    concluded = study(path, "--conclude")
    assert concluded.returncode == 1 and "1 of 3 runs failed: n-99" in concluded.stderr
    assert (folder / "report.html").is_file() and "3 to do" not in concluded.stderr


@pytest.mark.slow
def test_a_finished_run_of_other_data_is_neither_skipped_nor_overwritten(tiny_recipe):
    path = write_study(tiny_recipe, grid={"train.epochs": [1]})
    assert study(path).returncode == 0
    finished = Path("runs/sizes/epochs-1/finished.json")
    kept = json.loads(finished.read_text())
    del kept["recipe"]["matching"]["pooling"]  # as if written before there was such a key
    finished.write_text(json.dumps(kept))
    assert "1 run, 0 to do" in study(path).stderr
    lines = Path("test.jsonl").read_text().splitlines()
    Path("test.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    done = study(path)
    assert done.returncode == 1 and "1 run, 1 to do" in done.stderr
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


def test_a_look_at_a_run_does_not_keep_it_from_its_own_folder(tiny_recipe):
    """`--status` held the run's lock for a moment, in which its next stage was refused: "in use"."""
    loaded = load_study(Path(write_study(tiny_recipe, grid={"train.epochs": [1]})))
    folder, is_over, states = loaded.runs[0].recipe.run_folder, threading.Event(), set()

    def look() -> None:
        while not is_over.is_set():
            states.add(state_of(loaded.runs[0]))

    with folder_lock(folder, purpose="training"):
        assert state_of(loaded.runs[0]) == "running"
        with pytest.raises(UserInputError, match="in use for probing by process"):
            with folder_lock(folder, purpose="probing"):
                pass
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(200):
            with folder_lock(folder, purpose="training"):
                pass
    finally:
        is_over.set()
        watcher.join()
    assert states == {"running", "started"}, "it looked at both"


def test_a_study_on_a_cluster_is_concluded_behind_its_runs_however_they_end(tiny_recipe, monkeypatch):
    loaded = load_study(Path(write_study(tiny_recipe, grid={"train.epochs": [1, 2]})))
    programs = Path("programs")
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" >> asked.txt\necho $((40 + $(wc -l < asked.txt)))\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs.resolve()}:{os.environ['PATH']}")
    said = submit_study(loaded, Path("sizes.yaml"), Resources(options={}), throttle=3)
    assert said.startswith("job 41: study\njob 42: study-report\n")
    runs, last = Path("asked.txt").read_text().splitlines()
    assert "--dependency" not in runs and "--dependency=afterany:41" in last
    assert "#SBATCH --array=0,1%3\n" in Path("runs/sizes/slurm/study.sbatch").read_text()
    script = Path("runs/sizes/slurm/study-report.sbatch").read_text()
    assert "--array" not in script.partition("set -- ")[0].split("#SBATCH --signal")[1]
    assert script.partition("set -- ")[2].partition("\n")[0].endswith("--conclude")


def test_a_studys_notice_is_that_of_the_run_that_needs_the_longest(tiny_recipe, monkeypatch, caplog):
    submitted: list[list[Job]] = []

    def submit(folder: Path, jobs: list[Job]) -> list[str]:
        submitted.append(jobs)
        return ["41", "42"]

    monkeypatch.setattr("sftcore.launcher.study.submit_chain", submit)
    loaded = load_study(Path(write_study(tiny_recipe, grid={"batch.capacity": [2048, 10**8]})))
    needed = [notice_seconds(run.recipe, has_gpus=False) for run in loaded.runs]
    assert needed[0] == 180 < needed[1] < 3600

    def scripts(**options: str) -> list[str]:
        submit_study(loaded, Path("sizes.yaml"), Resources(options=options), throttle=3)
        return [job.script() for job in submitted[-1]]

    runs, last = scripts()
    assert f"#SBATCH --signal=B:USR1@{needed[1]}\n" in runs
    assert f"SFTCORE_NOTICE=${{SFTCORE_NOTICE:-{needed[1]}}}\n" in runs
    assert "--signal=B:USR1@180\n" in last and str(needed[1]) not in last, "nothing is trained there"
    assert not caplog.records
    assert "#SBATCH --signal=B:USR1@90\n" in scripts(signal="B:USR1@90")[0]
    assert f"a stop may take {needed[1]} s here" in caplog.text
    with pytest.raises(UserInputError, match=r"--time: the time limit is no longer than the notice"):
        scripts(time="3")


@pytest.mark.slow
def test_a_studys_runs_may_be_trained_by_several_ranks(tiny_recipe):
    """Two ranks train, one process does the rest; the run equals that of one process."""
    path = write_study(tiny_recipe, grid={"train.epochs": [1]})
    assert "No such option" in study(path, "--nodes", "2").stderr, "each run trains on one machine"
    done = study(path, "--ranks-per-node", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Path("runs/sizes/epochs-1")
    assert sorted(file.name for file in (run / "logs").glob("*.exit")) == ["rank-0.exit", "rank-1.exit"]
    assert json.loads((run / "plan.json").read_text())["world"] == 2
    assert study(path, "--run", "runs/one").returncode == 0
    ours, theirs = (
        json.loads(Path(folder, "study.json").read_text()) for folder in ("runs/sizes", "runs/one")
    )
    assert ours["runs"][0]["state"] == "finished"
    losses = [page["runs"][0].pop("last_loss") for page in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # packs are cut for the ranks
    assert ours["runs"] == theirs["runs"]
    broken = write_study(tiny_recipe | {"deepspeed": "absent"}, grid={"train.epochs": [2]})
    assert study(broken, "--ranks-per-node", "2", "--run", "runs/broken").returncode != 0


@pytest.mark.parametrize("way", ["node", "debug"])
def test_a_study_has_ways_of_its_own(tiny_recipe, way):
    """It used to run here, silently."""
    refused = study(write_study(tiny_recipe, grid={"train.epochs": [1]}), "--on", way, "--status")
    assert refused.returncode == 2 and "allowed: here, slurm" in refused.stderr


@pytest.mark.parametrize(("code", "kind"), [(75, StoppedOnRequest), (69, RankLost), (3, None), (134, None)])
def test_the_exit_code_of_a_runs_ranks_comes_back_as_an_error(tiny_recipe, monkeypatch, code, kind):
    monkeypatch.setattr("sftcore.launcher.ways_in.train_elsewhere", lambda *_, **__: code)
    recipe = load_study(Path(write_study(tiny_recipe, grid={"train.epochs": [1]}))).runs[0].recipe
    machines = Machines(on="node", ranks_per_node=2)
    with pytest.raises(kind or SftError, match=f"2 ranks ended with {code}; see .*logs") as caught:
        run_whole(recipe, train=partial(train_by_ranks, machines=machines))
    assert caught.value.exit_code == (code if code < 128 else 1)
