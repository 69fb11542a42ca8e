"""Jobs of stage.sbatch on a real Slurm: warned of the time limit they end with 75 and go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from cluster import logs, wait_for
from launcher_commands import save
from launching import write_recipe

from sftcore.fsio import read_jsonl

ROOT = Path(__file__).parent.parent.parent
STAGE = ROOT / "slurm" / "stage.sbatch"

pytestmark = pytest.mark.slurm


def write_program(text: str) -> str:
    """A program in the place of python; its path."""
    path = Path.cwd() / "program"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("warned", [0, 2])
def test_a_warning_to_one_job_of_an_array_queues_that_one_again(tmp_path, monkeypatch, cluster, warned):
    """The last job of an array has the array's own number: by that number Slurm means all of them."""
    monkeypatch.chdir(tmp_path)
    program = write_program(
        'echo "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0} $*" >> said.$SLURM_ARRAY_TASK_ID\n'
        '[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0\n'
        "trap 'exit 75' USR1\n"
        "while [ ! -e go ]; do sleep 0.1; done"
    )
    submitted = cluster.shell(f"SFTCORE_PYTHON={program} sbatch --parsable --array 0-2 {STAGE} probe RECIPE")
    assert submitted.returncode == 0, submitted.stderr
    array = submitted.stdout.strip()
    said = [tmp_path / f"said.{number}" for number in range(3)]
    wait_for(lambda: all(file.exists() for file in said))
    assert said[2].read_text().split()[0] == array, "the case to be tested"
    assert cluster.script("in.sh", "scancel", "-b", "-s", "USR1", f"{array}_{warned}").returncode == 0
    wait_for(lambda: said[warned].read_text().count("\n") == 2)
    Path("go").touch()
    wait_for(lambda: cluster.state(array) == "")
    restarts = [[line.split()[1] for line in file.read_text().splitlines()] for file in said]
    assert restarts == [["0", "1"] if number == warned else ["0"] for number in range(3)]
    line = f"-m sftcore.launcher.cli probe RECIPE --shard {warned}/3"
    assert [text.split(" ", 2)[2] for text in said[warned].read_text().splitlines()] == [line, line]


def test_a_stage_that_is_warned_queues_itself_again_and_goes_on(tiny_recipe, cluster):
    """It died of the signal: its job failed, and with it those that waited for it."""
    probe = {"templates": 2, "samples": 20, "max_new_tokens": 24, "batch_rows": 20}
    path = save(tiny_recipe, probe=probe)
    submitted = cluster.shell(f"SFTCORE_PYTHON={sys.executable} sbatch --parsable {STAGE} probe {path}")
    job = submitted.stdout.strip()
    partial = Path("runs/tiny/levels.partial.jsonl")
    wait_for(lambda: partial.is_file() and partial.read_text().count("\n") >= 3)
    assert cluster.script("in.sh", "scancel", "-b", "-s", "USR1", job).returncode == 0
    wait_for(lambda: "queued again" in logs())
    assert "stopped on request; start it again to go on" in logs()
    assert "COMPLETED" in cluster.wait(job), logs()[-3000:]
    assert cluster.restarts(job) == 1 and len(read_jsonl(Path("runs/tiny/levels.jsonl"))) == 24
    attempts = read_jsonl(Path("runs/tiny/attempts.jsonl"))
    assert [row["job"] for row in attempts] == [job, job]
    assert attempts[0]["probed_bytes"] == 0 < attempts[1]["probed_bytes"]


def test_ranks_that_cannot_start_fail_the_job_at_once(tiny_recipe, cluster):
    """A package that is broken on the nodes was taken for a lost rank, and tried four times."""
    path = write_recipe(tiny_recipe, "broken")
    Path("broken").mkdir()
    Path("broken/deepspeed.py").write_text("raise ImportError('no libcudart.so.13')\n")
    Path("env.sh").write_text(f"export PYTHONPATH={Path.cwd()}/broken:${{PYTHONPATH:-}}\n")
    job = cluster.train(path, "--nodes 2 --ranks-per-node 1", environment="SFTCORE_ENV=env.sh")
    said = cluster.wait(job)
    assert "FAILED" in said and "ExitCode=3:0" in said, said + logs()[-3000:]
    assert cluster.restarts(job) == 0 and "a package can't be imported: no libcudart.so.13" in logs()


def test_a_step_has_the_cores_that_its_job_asked_for(tiny_recipe, cluster):
    """In a folder with a space, alone on its node."""
    program = write_program(
        'case $* in *worker*) scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" > "step.$SLURM_PROCID";; esac'
    )
    path = write_recipe(tiny_recipe, "cores")
    options = '--nodes 2 --ranks-per-node 1 --cpus-per-rank 3 --sbatch exclusive --run "my runs/cores"'
    job = cluster.train(path, options, environment=f"SFTCORE_PYTHON={program}")
    cluster.wait(job)
    assert "CPUs=6 Tasks=2" in Path("step.0").read_text(), Path("step.0").read_text()
    assert list(Path("my runs/cores/slurm").glob("train-*.log"))


def test_a_studys_run_by_two_ranks_is_warned_goes_on_and_is_concluded(tiny_recipe, cluster):
    Path("base.yaml").write_text(yaml.safe_dump(tiny_recipe | {"checkpoint": {"save_every_steps": 100}}))
    Path("sizes.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "grid": {"train.epochs": [100]}}))
    submitted = cluster.shell("sftcore study sizes.yaml --on slurm --ranks-per-node 2")
    assert submitted.returncode == 0, submitted.stderr
    runs, last = (line.split()[1].rstrip(":") for line in submitted.stdout.splitlines()[:2])
    run = Path("runs/sizes/epochs-100")
    wait_for(lambda: (run / "checkpoints/step-000100/COMMITTED").exists())
    assert cluster.script("in.sh", "scancel", "-b", "-s", "USR1", f"{runs}_0").returncode == 0
    wait_for(lambda: "queued again" in logs())
    assert cluster.state(last) == "PENDING", "it waits for the end of runs that are queued again"
    assert "ExitCode=0:0" in cluster.wait(last), logs()[-3000:]
    assert "resuming after step" in (run / "run.log").read_text()
    assert [row["job"] for row in read_jsonl(run / "attempts.jsonl")] == [f"{runs}_0"] * 2
    assert sorted(file.name for file in (run / "logs").glob("*.exit")) == ["rank-0.exit", "rank-1.exit"]
    rows = json.loads(Path("runs/sizes/study.json").read_text())["runs"]
    assert [row["state"] for row in rows] == ["finished"]
