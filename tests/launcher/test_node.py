"""Ranks on one machine: a stop signal to any process of the tree ends all of them behind one checkpoint."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from launching import (
    BIN,
    ENVIRONMENT,
    ROOT,
    has_steps,
    launcher,
    run,
    steps,
    wait_for,
    weights_hash,
    write_recipe,
)

from sftcore.errors import UserInputError
from sftcore.launcher.hosts import read_hostfile
from sftcore.launcher.node import node_command
from sftcore.launcher.ranks import agreed_code, first_host, living_workers, slurm_rank_variables

LONG = {"train": {"epochs": 1000}, "checkpoint": {"save_every_steps": 100000}}
ON_NODE = ("--on", "node", "--ranks-per-node", "2")
TREE = {"sftcore": "bin/sftcore", "deepspeed": "bin/deepspeed", "launch": "deepspeed.launcher.launch"}


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tree_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """sftcore, deepspeed, launch, worker0, worker1."""
    found = {}
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        line = " ".join(one.cmdline())
        names = [name for name, word in TREE.items() if word in line.split(" --world_info")[0]]
        rank = line.partition("--local_rank=")[2][:1]
        if rank and "worker.py" in line:
            found.setdefault(f"worker{rank}", one)
        elif names:
            found.setdefault(names[-1], one)
    return found


def test_two_ranks_train_with_logs_apart(tiny_recipe):
    node = write_recipe(tiny_recipe, "node")
    shown = run(str(BIN / "sftcore"), "train", str(node), *ON_NODE, "--dry-run")
    assert shown.returncode == 0 and not Path("runs/node").exists()
    assert " --num_gpus 2 " in shown.stdout and "launcher/worker.py" in shown.stdout
    done = run(str(BIN / "sftcore"), "train", str(node), *ON_NODE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(steps("node")) == 8 and "step 8/8" in done.stdout + done.stderr, "rank 0 is shown"
    assert sorted(f.name for f in Path("runs/node/logs").iterdir()) == [
        "rank-0.exit",
        "rank-1.exit",
        "rank-1.log",
    ]
    assert Path("runs/node/run.pids").read_text() == ""
    again = run(str(BIN / "sftcore"), "train", str(node), *ON_NODE)
    assert again.returncode == 0 and "is finished" in again.stdout + again.stderr


SIGNALLED = [("sftcore", "TERM")]
REST = [
    (target, name)
    for target in ("sftcore", "deepspeed", "launch", "worker0", "worker1")
    for name in ("TERM", "USR1")
    if (target, name) not in SIGNALLED
]


@pytest.mark.parametrize(
    ("target", "name"),
    [*SIGNALLED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)],
)
def test_a_stop_signal_to_any_process_ends_all_behind_one_checkpoint(tiny_recipe, target, name):
    path = write_recipe(tiny_recipe, "cut", **LONG)
    process = start(str(BIN / "sftcore"), "train", str(path), *ON_NODE)
    wait_for(has_steps("cut"), process)
    tree = tree_of(process)
    assert set(tree) == {*TREE, "worker0", "worker1"}
    pids = {tree["worker0"].pid, tree["worker1"].pid}
    assert set(living_workers(Path("runs/cut"))) == pids
    tree[target].send_signal(getattr(signal, f"SIG{name}"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said[-3000:]
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in tree.values())
    done = len(steps("cut"))
    assert [f.name for f in Path("runs/cut/checkpoints").iterdir()] == [f"step-{done:06d}"]
    codes = {f.read_text() for f in Path("runs/cut/logs").glob("*.exit")}
    assert codes == {"75\n"} and done < 4000


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_is_killed(tiny_recipe):
    """Whether `sftcore` was killed, or a `deepspeed` that was typed by hand."""
    worker = str(ROOT / "launcher" / "worker.py")
    for name in ("ours", "theirs"):
        path = write_recipe(tiny_recipe, name, **LONG)
        by_hand = [*launcher(2), worker, str(path)]
        process = start(
            *([str(BIN / "sftcore"), "train", str(path), *ON_NODE] if name == "ours" else by_hand)
        )
        wait_for(has_steps(name), process)
        ranks = [one for key, one in tree_of(process).items() if "worker" in key]
        assert len(ranks) == 2
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
        process.communicate()
        assert [f.name for f in Path(f"runs/{name}/checkpoints").iterdir()] == [
            f"step-{len(steps(name)):06d}"
        ]


@pytest.mark.slow
def test_a_killed_rank_is_told_as_lost_and_the_run_goes_on_from_its_checkpoint(tiny_recipe):
    changes = {"train": {"epochs": 30}, "checkpoint": {"save_every_steps": 10}}
    whole, cut = (write_recipe(tiny_recipe, name, **changes) for name in ("whole", "cut"))
    assert run(str(BIN / "sftcore"), "train", str(whole), *ON_NODE).returncode == 0
    process = start(str(BIN / "sftcore"), "train", str(cut), *ON_NODE)
    wait_for(lambda: Path("runs/cut/checkpoints/step-000010/COMMITTED").exists(), process)
    tree_of(process)["worker1"].kill()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 69 and "another rank ended" in said, said[-3000:]
    done = run(str(BIN / "sftcore"), "train", str(cut), *ON_NODE)
    assert done.returncode == 0 and "resuming after step" in done.stdout + done.stderr
    assert weights_hash("cut") == weights_hash("whole")


def test_wrong_input_is_told_once_with_its_exit_code(tiny_recipe):
    path = str(write_recipe(tiny_recipe, "wrong", data={"max_length": 8}))
    done = run(str(BIN / "sftcore"), "train", path, *ON_NODE)
    assert done.returncode == 2 and (done.stdout + done.stderr).count("error:") == 1
    refused = run(str(BIN / "sftcore"), "train", path, "--nodes", "2", "--hostfile", "h", "--on", "debug")
    assert refused.returncode == 2
    for words in ("--nodes: not with --on debug", "--hostfile: not with --on debug"):
        assert words in refused.stderr
    for command in ("train", "probe", "evaluate"):  # "here" is a study's, and used to train in one process
        unknown = run(str(BIN / "sftcore"), command, path, "--on", "here")
        assert unknown.returncode == 2 and "no such way in" in unknown.stderr
        assert "allowed: debug, node, slurm" in unknown.stderr
    bare = run(str(BIN / "sftcore"), "train", path, "--on", "node")
    assert bare.returncode == 2 and "this machine has no GPU" in bare.stderr


def test_host_files(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two machines\nnode1 slots=8\n\nnode2 slots=8  # new\n")
    assert read_hostfile(file) == {"node1": 8, "node2": 8}
    file.write_text("node1 slots=8\nnode2\n")
    with pytest.raises(UserInputError, match=r"hosts:2: not a host"):
        read_hostfile(file)
    file.write_text("node1 slots=8\nnode1 slots=8\n")
    with pytest.raises(UserInputError, match=r"named before.*\n?.*hosts:2|hosts:2.*named before"):
        read_hostfile(file)
    for text, message in (("node1 8\n", "not a host"), ("# none\n", "no host in it")):
        file.write_text(text)
        with pytest.raises(UserInputError, match=message):
            read_hostfile(file)
    with pytest.raises(UserInputError, match="no such host file"):
        read_hostfile(tmp_path / "absent")


def test_rank_variables_and_codes():
    task = {
        "SLURM_JOB_ID": "123456",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "n[03-04]",
    }
    assert slurm_rank_variables(task) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "n03",
        "MASTER_PORT": "23456",
    }
    assert slurm_rank_variables(task | {"RANK": "0"}) == {}, "deepspeed inside of a job"
    assert slurm_rank_variables({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}) == {}, "a batch shell"
    assert first_host("rack[2-3]n[10-20],x") == "rack2n10"
    assert agreed_code({0: 0, 1: 0}, 2) == 0 and agreed_code({}, 2) == 69
    assert agreed_code({0: 75, 1: 1}, 2) == 1 and agreed_code({0: 137}, 1) == 1


def test_ranks_take_the_gpus_that_the_job_may_see(monkeypatch):
    """DeepSpeed's --num_gpus 2 takes GPUs 0 and 1 whatever CUDA_VISIBLE_DEVICES says (0.19.8)."""
    for visible, options in (
        (None, ["--num_gpus", "2"]),
        ("4,6,7", ["--include", "localhost:4,6"]),
        ("MIG-a,MIG-b", ["--num_gpus", "2"]),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert node_command([], num_ranks=2)[1:3] == options
        assert node_command([], num_ranks=2, has_gpus=False)[1:3] == ["--num_gpus", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserInputError, match="more ranks than visible GPUs"):
        node_command([], num_ranks=2)
