"""A real Slurm cluster of two simulated nodes trains to the same losses as one process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from sftcore.fsio import read_jsonl

ROOT = Path(__file__).parent.parent.parent
LAB = ROOT / "tests" / "slurmlab"
BIN = Path(sys.executable).parent


@pytest.fixture
def cluster():
    """Run client commands inside the lab; skips where it does not start (it needs root and Debian)."""
    lab = tempfile.mkdtemp(prefix="lab", dir="/tmp")  # munged wants folders that all may enter
    os.chmod(lab, 0o755)
    environment = os.environ | {"NODES": "2", "LAB": lab}
    try:
        started = subprocess.run(
            [str(LAB / "start.sh")], env=environment, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Slurm lab here: {error}")
    if started.returncode:
        pytest.skip(f"no Slurm lab here: {started.stderr[-300:]}")

    def client(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(LAB / script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    yield client
    client("stop.sh")
    shutil.rmtree(lab, ignore_errors=True)


@pytest.mark.slurm
def test_two_nodes_equal_one_process(tiny_recipe, cluster):
    for name in ("alone", "cluster"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tiny_recipe | {"name": name}), encoding="utf-8")
    alone = subprocess.run([str(BIN / "sftcore"), "train", "alone.yaml"], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-3000:]
    variables = f"OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu SFTCORE_PYTHON={sys.executable}"
    sbatch = f"sbatch --parsable --nodes 2 --ntasks-per-node 1 {ROOT}/slurm/train.sbatch cluster.yaml"
    submitted = cluster("in.sh", "bash", "-c", f"cd {Path.cwd()} && {variables} {sbatch}")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip().split()[-1]
    waited = cluster("wait.sh", job, "180")
    logs = "\n".join(log.read_text() for log in Path.cwd().glob("slurm-*.log"))
    assert "COMPLETED" in waited.stdout, waited.stdout + logs[-3000:]
    first, second = (read_jsonl(Path(f"runs/{name}/metrics.jsonl")) for name in ("alone", "cluster"))
    assert len(first) == len(second) == 8
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
    assert second[0]["num_packs"] >= 2, "both nodes had work"


@pytest.mark.slurm
def test_a_submission_without_a_recipe_says_how(cluster, tmp_path):
    submitted = cluster(
        "in.sh", "bash", "-c", f"cd {tmp_path} && sbatch --parsable {ROOT}/slurm/train.sbatch"
    )
    job = submitted.stdout.strip().split()[-1]
    waited = cluster("wait.sh", job, "60")
    assert "FAILED" in waited.stdout
    assert "usage: sbatch" in (tmp_path / f"slurm-{job}.log").read_text()


def test_no_sbatch_line_has_a_variable():
    for script in (ROOT / "slurm").glob("*.sbatch"):
        lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert lines and not any("$" in line for line in lines)
