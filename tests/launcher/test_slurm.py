"""A real Slurm cluster of two simulated nodes: jobs stop, move and fail; the losses are a whole run's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import LAB, logs, wait_for
from launcher_commands import sftcore
from launching import run_cells, steps, write_recipe
from warm import BIN

from sftcore.errors import TrainingFailed, UserInputError
from sftcore.fsio import read_jsonl
from sftcore.launcher.attempts import begin_attempt
from sftcore.launcher.notice import notice_seconds, with_notice
from sftcore.launcher.slurm import TEMPLATES, Resources, fill_in, recipe_jobs, train_job
from sftcore.recipe import load_recipe
from sftcore.train.checkpoint import newest_usable

ROOT = Path(__file__).parent.parent.parent
LONG = {"train": {"epochs": 250}, "checkpoint": {"save_every_steps": 100}}  # 1,000 steps
SCRIPTS = sorted([*ROOT.glob("slurm/*.s*"), *LAB.glob("*.sh"), ROOT / ".ci" / "run"])
WHOLE: list[float] = []  # the losses of LONG with two ranks, uninterrupted; computed once


def has_checkpoint(name: str, step: int):
    return lambda: (Path("runs") / name / "checkpoints" / f"step-{step:06d}" / "COMMITTED").exists()


def check_whole(tiny_recipe: dict, name: str) -> None:
    """The run's losses are, to the bit, those of a run of two ranks that nobody disturbed."""
    if not WHOLE:
        run_cells([write_recipe(tiny_recipe, "whole", **LONG)], ranks=2)
        WHOLE.extend(step["loss"] for step in steps("whole"))
    assert [s["step"] for s in steps(name)] == list(range(1, 1001))
    assert [s["loss"] for s in steps(name)] == WHOLE
    assert Path(f"runs/{name}/model/config.json").exists()


@pytest.mark.slurm
def test_two_nodes_with_two_ranks_each_equal_one_process(tiny_recipe, cluster):
    alone, path = (write_recipe(tiny_recipe, name) for name in ("alone", "cluster"))
    run_cells([alone], ranks=1)
    job = cluster.train(path, "--nodes 2 --ranks-per-node 2 --partition main --time 10")
    assert "COMPLETED" in cluster.wait(job), logs()[-3000:]
    first, second = steps("alone"), steps("cluster")
    assert len(first) == len(second) == 8
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
    assert second[0]["num_packs"] >= 4, "all ranks had work"
    script = Path("runs/cluster/slurm/train.sbatch").read_text()
    assert "#SBATCH --partition=main\n#SBATCH --time=10\n" in script
    assert {f.name for f in Path("runs/cluster/logs").glob("*.exit")} == {f"rank-{i}.exit" for i in range(4)}


@pytest.mark.slurm
def test_a_warning_ahead_of_the_time_limit_saves_queues_again_and_finishes(tiny_recipe, cluster):
    """The signal of --signal=B:USR1@180, sent by hand: Slurm looks at the clock twice a minute only."""
    job = cluster.train(write_recipe(tiny_recipe, "cut", **LONG), "--nodes 2 --ranks-per-node 1")
    wait_for(has_checkpoint("cut", 100))
    assert cluster.script("in.sh", "scancel", "-b", "-s", "USR1", job).returncode == 0
    wait_for(lambda: "queued again" in logs())
    cut = len(steps("cut"))
    assert 100 <= cut < 1000 and has_checkpoint("cut", cut)()
    assert "COMPLETED" in cluster.wait(job), logs()[-3000:]
    assert f"resuming after step {cut}" in logs() and cluster.restarts(job) == 1
    assert [row["step"] for row in read_jsonl(Path("runs/cut/attempts.jsonl"))] == [0, cut]
    check_whole(tiny_recipe, "cut")


@pytest.mark.slurm
def test_a_job_that_is_preempted_goes_on_later(tiny_recipe, cluster):
    job = cluster.train(write_recipe(tiny_recipe, "cut", **LONG), "--nodes 2 --ranks-per-node 1")
    wait_for(has_checkpoint("cut", 100))
    urgent = cluster.shell("sbatch --parsable -p urgent --exclusive --nodes 2 -o urgent.txt --wrap 'sleep 3'")
    assert urgent.returncode == 0, urgent.stderr
    wait_for(lambda: cluster.restarts(job) == 1)
    assert "COMPLETED" in cluster.wait(job), logs()[-3000:]
    assert "resuming after step" in logs()
    check_whole(tiny_recipe, "cut")


@pytest.mark.slurm
@pytest.mark.parametrize("kind", ["crash", "unplug"])
def test_a_job_that_loses_a_node_is_queued_again_and_resumes(tiny_recipe, cluster, kind):
    job = cluster.train(write_recipe(tiny_recipe, "cut", **LONG), "--nodes 2 --ranks-per-node 1")
    wait_for(has_checkpoint("cut", 100))
    cluster.script("node.sh", kind, "node2")
    wait_for(lambda: cluster.restarts(job) == 1, seconds=60)
    assert len(steps("cut")) < 1000
    cluster.script("node.sh", "up" if kind == "crash" else "plug", "node2")
    assert "COMPLETED" in cluster.wait(job), logs()[-3000:]
    assert "resuming after step" in logs()
    check_whole(tiny_recipe, "cut")


@pytest.mark.slurm
def test_a_rank_on_an_unplugged_node_gives_the_run_up_to_the_jobs_next_attempt(tiny_recipe, cluster):
    """The whole job is on node1, which lives on without its network: two attempts would write one folder."""
    changes = {"train": {"epochs": 2000}, "checkpoint": {"save_every_steps": 100}}
    path = write_recipe(tiny_recipe, "split", **changes)
    job = cluster.train(path, "--nodes 1 --ranks-per-node 1")
    wait_for(has_checkpoint("split", 100))
    first = cluster.shell(f"squeue --noheader --jobs {job} --format %N").stdout.strip()
    cluster.script("node.sh", "unplug", first)
    wait_for(lambda: "resuming after step" in logs(), seconds=120)
    said = logs()
    assert "was taken over by" in said and "ending" in said
    lease = json.loads(Path("runs/split/lease.json").read_text())
    assert lease["attempt"] == 1 and lease["job"] == job
    cluster.script("node.sh", "plug", first)


@pytest.mark.slurm
def test_a_cancelled_job_leaves_a_checkpoint_and_is_not_queued_again(tiny_recipe, cluster):
    job = cluster.train(write_recipe(tiny_recipe, "cut", **LONG), "--nodes 2 --ranks-per-node 1")
    wait_for(has_checkpoint("cut", 100))
    assert cluster.script("in.sh", "scancel", job).returncode == 0
    assert "CANCELLED" in cluster.wait(job)
    newest = newest_usable(Path("runs/cut"))
    assert newest is not None and int(newest.name[5:]) >= 100 and len(steps("cut")) < 1000
    assert "queued again" not in logs()


@pytest.mark.slurm
def test_a_study_of_six_runs_with_one_that_fails_as_an_array(tiny_recipe, cluster):
    """No six facts of 16 can be 99: that run fails, the others don't."""
    Path("base.yaml").write_text(yaml.safe_dump(tiny_recipe))
    grid = {"select.n": [4, 99, 6], "select.levels": [[0, 1, 2, 3, 4]], "train.epochs": [1, 2]}
    study = {"base": "base.yaml", "grid": grid}
    Path("sizes.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    refused = cluster.shell("sftcore study sizes.yaml --on slurm --sbatch partition=absent")
    assert refused.returncode == 2 and "Slurm refuses the job study" in refused.stderr
    submitted = cluster.shell("sftcore study sizes.yaml --on slurm --throttle 2")
    assert submitted.returncode == 0, submitted.stderr
    job, last = (line.split()[1].rstrip(":") for line in submitted.stdout.splitlines()[:2])
    wait_for(lambda: cluster.state(job) == "", seconds=600)
    assert "ExitCode=1:0" in cluster.wait(last), "some runs failed"
    assert "2 of 6 runs failed" in logs() and Path("runs/sizes/report.html").is_file()
    done = cluster.shell("sftcore study sizes.yaml --status")
    assert "4 finished" in done.stdout and "2 failed" in done.stdout, done.stdout + logs()[-3000:]
    rows = json.loads(Path("runs/sizes/study.json").read_text())["runs"]
    assert [row["state"] for row in rows] == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 2
    assert len(list(Path("runs/sizes/shared").glob("levels-*/levels.jsonl"))) == 1


@pytest.mark.slurm
def test_a_whole_recipe_is_submitted_as_a_chain(tiny_recipe, cluster):
    """Probe, prepare and evaluate by two jobs each, and one that merges."""
    path = write_recipe(tiny_recipe, "chain", select={"levels": [0, 1, 2, 3, 4], "n": 8})
    done = cluster.shell(f"sftcore submit {path} --shards 2 --ranks-per-node 2")
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job")]
    assert len(jobs) == 8
    assert "COMPLETED" in cluster.wait(jobs[-1]), logs()[-3000:]
    report = json.loads(Path("runs/chain/report.json").read_text())
    assert report["n"] == 8 and report["acc_tuned"] is not None and len(steps("chain")) == 4
    assert len(read_jsonl(Path("runs/chain/levels.jsonl"))) == 24


@pytest.mark.slurm
def test_what_is_wrong_fails_in_the_submit_command(tiny_recipe, cluster):
    wrong = write_recipe(tiny_recipe, "wrong", train={"lr": 0})
    done = cluster.shell(f"sftcore train {wrong} --on slurm --ranks-per-node 2")
    assert done.returncode == 2 and "train.lr" in done.stderr
    right = write_recipe(tiny_recipe, "right")
    for options, words in (
        ("--ranks-per-node 2 --partition absent", "Slurm refuses the job train"),
        ("", "how many ranks per machine?"),
        ("--ranks-per-node 2 --sbatch 'comment=`a`'", "a batch script can't hold this option of sbatch"),
    ):
        done = cluster.shell(f"sftcore train {right} --on slurm {options}")
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert cluster.shell("squeue --noheader").stdout == ""


@pytest.mark.slurm
def test_scripts_work_by_hand(tiny_recipe, cluster):
    path = write_recipe(tiny_recipe, "hand")
    submitted = cluster.shell(
        f"SFTCORE_PYTHON={sys.executable} sbatch --parsable --ntasks 2 {ROOT}/slurm/train.sbatch {path}"
    )
    bare = cluster.shell(f"sbatch --parsable {ROOT}/slurm/train.sbatch")
    assert "COMPLETED" in cluster.wait(submitted.stdout.strip()), logs()[-3000:]
    assert len(steps("hand")) == 8
    assert "FAILED" in cluster.wait(bare.stdout.strip()) and "usage: sbatch" in logs()


def test_a_script_is_filled_in_strictly(tiny_recipe, tmp_path):
    recipe = load_recipe(write_recipe(tiny_recipe, "r"), [f"run={tmp_path / 'r'}"])
    resources = Resources(nodes=2, gpus_per_node=8, options={"time": "4:00:00"})
    text = train_job(recipe, resources, ["--resume", "auto"]).script()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=4", "time=4:00:00"):
        assert f"#SBATCH --{line}\n" in text
    assert (
        f"set -- {tmp_path}/r/recipe.yaml --run {tmp_path}/r --resume auto\n" in text
        and "#@" not in text[600:]
    )
    with pytest.raises(UserInputError, match="no value for #@arguments@"):
        fill_in((TEMPLATES / "train.sbatch").read_text(), {"sbatch": ""})
    with pytest.raises(UserInputError, match="the template has no line #@time@"):
        fill_in("#@sbatch@\n", {"sbatch": "", "time": "1"})
    names = [job.name for job in recipe_jobs(recipe, resources, num_shards=4)]
    assert names == ["prepare", "prepare-merge", "train", "evaluate", "evaluate-merge", "report"]


def test_the_notice_follows_from_the_recipe_and_is_held_against_the_limit(tiny_recipe, tmp_path, caplog):
    recipe = load_recipe(write_recipe(tiny_recipe, "r"), [f"run={tmp_path / 'r'}"])

    def script(**options: str) -> str:
        return train_job(recipe, Resources(ranks_per_node=2, options=options), []).script()

    text = script(time="10")
    assert "#SBATCH --signal=B:USR1@180\n" in text and "SFTCORE_NOTICE=${SFTCORE_NOTICE:-180}\n" in text
    longer = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"capacity": 10**8})})
    needed = notice_seconds(longer, has_gpus=False)
    assert (
        180 < notice_seconds(longer, has_gpus=False) <= 3600 and notice_seconds(longer, has_gpus=True) == 180
    )
    assert with_notice({}, needed) == {"signal": f"B:USR1@{needed}"} and not caplog.records
    assert "#SBATCH --signal=B:USR1@90\n" in script(signal="B:USR1@90", time="2")
    assert "a stop may take 180 s here" in caplog.text
    for time in ("3", "2:59", "0:03:00", "0-0:3"):
        with pytest.raises(UserInputError, match=r"--time: the time limit is no longer than the notice"):
            script(time=time)
    script(time="3:01")


def test_a_flag_a_path_with_spaces_and_the_cores_of_a_rank_reach_the_script(tiny_recipe, tmp_path):
    path = str(write_recipe(tiny_recipe, "r"))
    line = ["train", path, "--on", "slurm", "--ranks-per-node", "2", "--dry-run"]
    done = sftcore(*line, "--run", "my runs/r", "--sbatch", "exclusive", "--sbatch", "--mem=8G")
    assert done.returncode == 0, done.stderr
    assert f'#SBATCH --output="{tmp_path}/my runs/r/slurm/train-%j.log"\n' in done.stdout
    assert "#SBATCH --exclusive\n" in done.stdout and "#SBATCH --mem=8G\n" in done.stdout
    assert "--cpus-per-task" not in done.stdout, "the site's default, unless it is asked for"
    assert "#SBATCH --cpus-per-task=3\n" in sftcore(*line, "--cpus-per-rank", "3").stdout
    refused = sftcore(*line, "--run", "runs/$r")
    assert refused.returncode == 2 and "--run DIR chooses another" in refused.stderr, refused.stderr
    local = sftcore("train", path, "--cpus-per-rank", "3")
    assert local.returncode == 2 and "--cpus-per-rank, --partition" in local.stderr


def test_a_job_that_starts_all_ranks_itself_has_the_cores_and_gpus_of_all():
    on_gpus = Resources(gpus_per_node=8, options={"cpus-per-task": "12"}).run_options()
    assert on_gpus["ntasks"] == "1" and on_gpus["gpus-per-node"] == "8" and on_gpus["cpus-per-task"] == "96"
    assert Resources(gpus_per_node=2, options={}).run_options()["cpus-per-task"] == "8"
    assert Resources(ranks_per_node=3, options={}).run_options()["cpus-per-task"] == "3"
    assert "cpus-per-task" not in Resources(options={}).run_options(), "the site's default"
    alone = Resources(gpus_per_node=8, options={"exclusive": ""})
    for options in (alone.run_options(), alone.train_options(), alone.stage_options()):
        assert "cpus-per-task" not in options, "all of the node's"


def test_attempts_without_progress_are_limited(tmp_path):
    environment = {"SLURM_JOB_ID": "7", "SFTCORE_RETRIES": "1"}
    begin_attempt(tmp_path, environment)
    begin_attempt(tmp_path, environment)
    with pytest.raises(TrainingFailed, match="2 attempts in a row made no progress past step 0"):
        begin_attempt(tmp_path, environment)
    folder = tmp_path / "checkpoints" / "step-000050"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").touch()
    begin_attempt(tmp_path, environment)
    begin_attempt(tmp_path, environment)
    begin_attempt(tmp_path, environment | {"SLURM_JOB_ID": "8"})
    assert [row["step"] for row in read_jsonl(tmp_path / "attempts.jsonl")] == [0, 0, 50, 50, 50]


def test_no_sbatch_line_has_a_variable():
    for script in (ROOT / "slurm").glob("*.sbatch"):
        lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert lines and not any("$" in line for line in lines)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_bash_and_shellcheck(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if "slurmlab" in script.parts:
        return
    done = subprocess.run([str(BIN / "shellcheck"), "-x", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
