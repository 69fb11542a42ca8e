"""One import name: the wheel holds `sftcore` and nothing else at its top, and works where no clone is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from packaged import packaged_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "clone"
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source.mkdir()
    copy = ["tar", "--create", "--file", "-", "--files-from", "-"]
    packed = subprocess.run(copy, cwd=ROOT, input=files.encode(), capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", "--file", "-"], cwd=source, input=packed, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, and the packages that it needs from this one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    # a path that is added by a .pth file has its own .pth files left out: the clone stays unknown
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment as a user would, in a folder outside of the clone."""
    kept = {name: os.environ[name] for name in ("HOME", "TORCH_EXTENSIONS_DIR") if name in os.environ}
    path = f"{installed}:{Path(sys.executable).parent}:/usr/bin:/bin"  # ninja is this environment's
    environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(installed / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )


def test_the_wheel_holds_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sftcore"} and len(tops) == 2
    for folder in ("launcher", "ds_configs", "recipes", "slurm"):
        own = {f"sftcore/{folder}/{file.name}" for file in (ROOT / folder).iterdir() if file.is_file()}
        assert own and own <= set(names), folder
    assert "sftcore/py.typed" in names


def test_outside_of_a_clone_it_is_found_and_the_folders_names_are_free(installed, tmp_path):
    code = "import sftcore.launcher.cli, importlib.util as u, sys\n"
    code += "print(sftcore.__file__, 'torch' in sys.modules)\n"
    code += "print([name for name in ('launcher', 'recipes', 'slurm', 'ds_configs') if u.find_spec(name)])"
    shown = run(installed, tmp_path, "python", "-c", code)
    assert shown.returncode == 0, shown.stderr
    where, has_torch, left = shown.stdout.replace("\n", " ").split(" ", 2)
    assert Path(where).is_relative_to(installed.parent) and has_torch == "False" and left.strip() == "[]"


def test_a_clone_without_installation_is_found(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import sftcore.launcher.cli as cli; print(cli.__file__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.stdout.strip() == str(ROOT / "sftcore" / "launcher" / "cli.py"), shown.stderr


@pytest.mark.slow
def test_the_wheel_trains_on_a_node_and_writes_batch_scripts(installed, tiny_recipe):
    recipe = tiny_recipe | {"name": "wheel"}
    Path("wheel.yaml").write_text(yaml.safe_dump(recipe))
    here = Path.cwd()
    doctor = run(installed, here, "sftcore", "doctor")
    assert doctor.returncode == 0 and "deepspeed" in doctor.stdout, doctor.stdout + doctor.stderr
    ranks = ("--on", "node", "--ranks-per-node", "2")
    trained = run(installed, here, "sftcore", "train", "wheel.yaml", *ranks)
    assert trained.returncode == 0, (trained.stdout + trained.stderr)[-3000:]
    assert Path("runs/wheel/model/model.safetensors").is_file()
    assert len(Path("runs/wheel/metrics.jsonl").read_text().splitlines()) == 8  # 2 epochs of 16 / 4
    cluster = ("--on", "slurm", "--ranks-per-node", "2", "--run", "other", "--dry-run")
    written = run(installed, here, "sftcore", "train", "wheel.yaml", *cluster)
    assert written.returncode == 0, written.stderr
    assert "-m sftcore.launcher.worker" in written.stdout and "#SBATCH" in written.stdout


@pytest.mark.slow
def test_the_wheel_runs_quickstart(installed, tmp_path):
    models = tmp_path / ".cache" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m").symlink_to(packaged_model("smollm2-135m"))
    done = run(installed, tmp_path, "sftcore", "quickstart")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
