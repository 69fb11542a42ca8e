"""A host file's machines: DeepSpeed's launcher over real ssh and pdsh, from a login node without ranks."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, started_cluster
from launching import BIN, has_steps, run_cells, steps, wait_for, write_recipe

SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
AcceptEnv ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA
UsePAM no
PidFile none
"""
CLIENT = """Host node*
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  SendEnv ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
LONG = {"train": {"epochs": 1000}, "checkpoint": {"save_every_steps": 100000}}
TRAIN = "sftcore train {path} --on node --hostfile hosts"

pytestmark = [
    pytest.mark.slurm,  # of which only the machines are used
    pytest.mark.skipif(
        not shutil.which("pdsh") or not Path("/usr/sbin/sshd").exists(), reason="no pdsh, sshd"
    ),
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two machines with an sshd each; a third has the key to them."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "config").write_text(CLIENT.format(folder=folder))
    with started_cluster(nodes=3, login="node3") as cluster:
        mounted = "mkdir -p /root/.ssh /run/sshd && mount -t tmpfs ssh /root/.ssh && chmod 700 /root/.ssh"
        copied = f"cp {folder}/config /root/.ssh/config"
        assert cluster.shell(f"{mounted} && {copied}").returncode == 0
        for node in ("node1", "node2"):
            sshd = cluster.script("in.sh", f"@{node}", "/usr/sbin/sshd", "-f", f"{folder}/sshd_config")
            assert sshd.returncode == 0, sshd.stderr
        yield cluster


@pytest.fixture
def hosts(machines: Cluster, tiny_recipe) -> Cluster:
    Path("hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    return machines


def start(hosts: Cluster, line: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(hosts.command(f"exec {line}"), env=hosts.environment, **pipes)


def test_two_machines_train_as_two_ranks_of_one(hosts, tiny_recipe):
    path, alone = write_recipe(tiny_recipe, "apart"), write_recipe(tiny_recipe, "alone")
    done = hosts.shell(TRAIN.format(path=path))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "step 8/8" in done.stdout + done.stderr and Path("runs/apart/logs/rank-1.log").exists()
    run_cells([alone], ranks=2)
    assert [step["loss"] for step in steps("apart")] == [step["loss"] for step in steps("alone")]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_stop_on_the_login_node_reaches_the_ranks(hosts, tiny_recipe, name):
    path = write_recipe(tiny_recipe, "cut", **LONG)
    process = start(hosts, TRAIN.format(path=path))
    wait_for(has_steps("cut"), process)
    below = psutil.Process(process.pid).children(recursive=True)  # of what entered the login node
    sftcore = next(one for one in below if str(BIN / "sftcore") in one.cmdline())
    sftcore.send_signal(getattr(signal, f"SIG{name}"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said[-3000:]
    done = len(steps("cut"))
    assert [f.name for f in Path("runs/cut/checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert {f.read_text() for f in Path("runs/cut/logs").glob("*.exit")} == {"75\n"}


def test_a_machine_that_cannot_be_reached_is_named(hosts, tiny_recipe):
    Path("hosts").write_text("node1 slots=1\nnode7 slots=1\n")
    done = hosts.shell(TRAIN.format(path=write_recipe(tiny_recipe, "lost")))
    assert done.returncode == 3 and "node7 can't be reached: ssh: Could not resolve" in done.stderr


def test_a_machine_without_the_run_folder_is_named(hosts, tiny_recipe):
    hosts.script("in.sh", "@node2", "mount", "-t", "tmpfs", "none", str(Path.cwd()))
    done = hosts.shell(TRAIN.format(path=write_recipe(tiny_recipe, "apart")))
    hosts.script("in.sh", "@node2", "umount", str(Path.cwd()))
    assert done.returncode == 3 and f"node2 lacks {Path.cwd()}/runs/apart" in done.stderr, done.stderr
    assert "must share the run folder" in done.stderr and "node1" not in done.stderr


def test_a_single_machine_of_a_host_file_is_that_machine(hosts, tiny_recipe):
    Path("hosts").write_text("node1 slots=1\n")
    done = hosts.shell(TRAIN.format(path=write_recipe(tiny_recipe, "there")))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "node1: step 8/8" in done.stdout + done.stderr
