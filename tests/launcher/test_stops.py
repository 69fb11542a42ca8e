"""What is told to stop ends with 75 and goes on later; a stage that never gets on is given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launcher_commands import save, sftcore
from tiny import SUBJECTS, write_lines
from warm import BIN, Process

from sftcore.errors import TrainingFailed
from sftcore.fsio import read_jsonl
from sftcore.launcher.attempts import begin_stage, work_done
from sftcore.train.stopping import handling

ROOT = Path(__file__).parent.parent.parent
PARTS = ".cache/stores/*.parts/part-*/part.json"


def stopped(command: list[str], happens, number: signal.Signals) -> str:
    """Start it, send it a signal when something has happened; what it said before it ended with 75."""
    process = Process([str(BIN / "sftcore"), *command], dict(os.environ))
    deadline = time.monotonic() + 120
    while not happens():
        assert process.poll() is None and time.monotonic() < deadline, process.output()[1][-3000:]
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and "Traceback" not in said, (process.returncode, said[-3000:])
    assert said.count("stopped on request; start it again to go on") == 1
    return said


def holds_lines(path: str, count: int):
    return lambda: Path(path).is_file() and Path(path).read_text().count("\n") >= count


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard", "0/1"]], ids=["whole", "shard"])
def test_a_probe_stops_behind_a_batch_and_goes_on(tiny_recipe, shard):
    probe = {"templates": 2, "samples": 20, "max_new_tokens": 24, "batch_rows": 20}
    path = save(tiny_recipe, probe=probe)
    partial = f"runs/tiny/{'shards/0-of-1/' if shard else ''}levels.partial.jsonl"
    stopped(["probe", path, *shard], holds_lines(partial, 3), signal.SIGUSR1)
    done = work_done(Path("runs/tiny"))
    assert done["probed_bytes"] == Path(partial).stat().st_size and done["finished"] == 0
    before = Path(partial).read_text().splitlines()[:3]
    if shard:
        assert sftcore("probe", path, *shard).returncode == 0
        assert Path(partial).read_text().splitlines()[:3] == before, "not measured again"
        assert sftcore("probe", path, "--merge").returncode == 0
    else:
        assert sftcore("probe", path).returncode == 0
    assert len(read_jsonl(Path("runs/tiny/levels.jsonl"))) == 24
    assert work_done(Path("runs/tiny"))["finished"] == 1


@pytest.mark.parametrize("command", ["train", "run"])
def test_ctrl_c_stops_behind_a_checkpoint_and_the_run_goes_on(tiny_recipe, command):
    """Of a single process; the ranks of a launcher have it hand Ctrl-C on."""
    path = save(tiny_recipe, train={"epochs": 60, "lr": 1e-2}, checkpoint={"save_every_steps": 1000})
    process = Process([str(BIN / "sftcore"), command, path], dict(os.environ))
    deadline = time.monotonic() + 120
    while not holds_lines("runs/tiny/metrics.jsonl", 3)():
        assert process.poll() is None and time.monotonic() < deadline, process.output()[1][-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in said, (process.returncode, said[-3000:])
    assert said.count("stopping after this step; Ctrl-C again to quit at once") == 1
    done = len(read_jsonl(Path("runs/tiny/metrics.jsonl")))
    assert 3 <= done < 240 and Path(f"runs/tiny/checkpoints/step-{done:06d}/COMMITTED").is_file()
    again = sftcore(command, path)
    assert again.returncode == 0 and f"resuming after step {done}" in again.stderr, again.stderr[-3000:]
    assert len(read_jsonl(Path("runs/tiny/metrics.jsonl"))) == 240


def test_a_second_ctrl_c_ends_a_process_at_once():
    code = "from sftcore.train.stopping import WITH_INTERRUPT, StopRequest\nimport time\n"
    code += "with StopRequest(WITH_INTERRUPT) as stop:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert b"Ctrl-C again" in process.stderr.readline() and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_who_took_a_signal_before_takes_it_again():
    def one(number, frame):
        seen.append("one")

    def two(number, frame):
        seen.append("two")

    seen: list[str] = []
    with handling([signal.SIGUSR1], one):
        with handling([signal.SIGUSR1], two):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        thread = threading.Thread(target=lambda: handling([signal.SIGUSR1], two).__enter__())
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGUSR1)
    assert seen == ["two", "one", "one"], "outside of the main thread nothing is installed"


@pytest.mark.slow
def test_an_evaluation_stops_and_goes_on_with_the_next_model(tiny_recipe):
    path = save(tiny_recipe, evaluate={"max_new_tokens": 60, "batch_size": 1})
    stopped(["evaluate", path], lambda: "evaluating base" in log_of("tiny"), signal.SIGTERM)
    assert not Path("runs/tiny/eval/base/manifest.json").exists()
    assert sftcore("evaluate", path).returncode == 0
    assert work_done(Path("runs/tiny"))["finished"] == 1


def log_of(run: str) -> str:
    path = Path("runs", run, "run.log")
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_a_prepare_stops_with_its_workers_and_keeps_finished_parts(tiny_recipe):
    """Two workers and six files; they end with the process that started them."""
    rows = [
        {"id": f"f{i}", "relation": "P19", "subject": f"{SUBJECTS[i % 12]} {i}", "answers": ["Oslo"]}
        for i in range(30_000)
    ]
    for number in range(6):
        write_lines(Path(f"train{number}.jsonl"), rows[number::6])
    sources = [{"format": "facts", "path": f"train{number}.jsonl"} for number in range(6)]
    path = save(tiny_recipe, data={"train": sources})
    line = ["prepare", path, "--workers", "2"]
    stopped(line, lambda: list(Path().glob(PARTS)), signal.SIGUSR1)
    kept = {part: part.stat().st_mtime_ns for part in Path().glob(PARTS)}
    assert 1 <= len(kept) < 6 and work_done(Path("runs/tiny"))["parts"] == len(kept)
    again = sftcore(*line)
    assert again.returncode == 0, again.stderr[-2000:]
    for part, made in kept.items():
        assert Path(str(part).replace(".parts", "")).stat().st_mtime_ns == made, "not made again"


def test_attempts_of_a_stage_without_progress_are_limited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    begin_stage(run, "probe", environment={})
    assert not run.exists(), "outside of a job nothing is noted"
    environment = {"SFTCORE_STAGE_JOB": "7_2", "SFTCORE_RETRIES": "1"}
    shard = run / "shards" / "0-of-2"
    shard.mkdir(parents=True)
    for number in range(4):
        (shard / "levels.partial.jsonl").write_text("x" * number)
        begin_stage(run, "probe", environment=environment)
    begin_stage(run, "probe", environment=environment | {"SFTCORE_STAGE_JOB": "7_1"})
    begin_stage(run, "probe", environment=environment)
    with pytest.raises(TrainingFailed, match="2 attempts in a row made no progress in probe"):
        begin_stage(run, "probe", environment=environment)
    part = Path(".cache/stores/abc.parts/part-0/part.json")
    part.parent.mkdir(parents=True)
    part.touch()
    begin_stage(run, "probe", environment=environment)
    begin_stage(run, "evaluate", environment=environment)
    assert [row["probed_bytes"] for row in read_jsonl(run / "attempts.jsonl")] == [0, 1, 2, *[3] * 5]


def test_a_rank_that_cannot_import_a_package_leaves_the_environments_code(tiny_recipe, tmp_path):
    """Before, it left none, which looked like a lost rank: the job was queued again three times."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    path = save(tiny_recipe)
    environment = os.environ | {"PYTHONPATH": f"{broken}:{ROOT}"}
    command = [sys.executable, str(ROOT / "launcher" / "worker.py"), path, "--rank-logs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "libcudart.so.13" in done.stderr and "sftcore doctor" in done.stderr
    assert Path("runs/tiny/logs/rank-0.exit").read_text() == "3\n"
    environment |= {"SFTCORE_WORLD": "2", "SFTCORE_CODE": "143"}
    command = [sys.executable, "-m", "sftcore.launcher.attempts", "end", path]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert told.stdout == "3\n", "the other rank was killed"
