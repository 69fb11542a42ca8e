"""A run never writes over files of others; what killed processes left goes at the next start."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from launcher_commands import save, sftcore

from sftcore.errors import UserInputError
from sftcore.fsio import atomic_file, atomic_folder, write_json
from sftcore.launcher.job_commands import load
from sftcore.recipe import load_recipe
from sftcore.run_recipe import SEAL, WRITTEN, check_free_for_run, read_run_recipe
from sftcore.runs.claim import claim, open_run, sweep


@pytest.fixture
def path(tiny_recipe) -> Path:
    return Path(save(tiny_recipe))


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "../a", ""])
def test_a_name_is_a_folder_name(path, name):
    with pytest.raises(UserInputError, match="name"):
        load_recipe(path, [f"name={name!r}"])


def test_the_folder_of_the_recipe_is_no_run_folder(path):
    before = path.read_bytes()
    for run in (".", str(path.resolve().parent), "runs/.."):
        Path("runs").mkdir(exist_ok=True)
        for command in ("plan", "train", "probe", "evaluate", "prepare", "run"):
            done = sftcore(command, str(path), "--run", run)
            assert done.returncode == 2 and "the run folder is the folder of the recipe" in done.stderr
    assert path.read_bytes() == before and not Path("environment.json").exists()
    other = Path("other.yaml")
    other.write_bytes(before)
    path.unlink()
    with pytest.raises(UserInputError, match="the run folder is the folder of the recipe"):
        load(other, None, ".")


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_no_run_wrote_are_not_written_over(path, name):
    """Each name that a run writes, as a user's file, folder and dangling link."""
    for kind in ("file", "folder", "link"):
        own = Path(f"own-{kind}", name)
        own.parent.mkdir()
        match kind:
            case "file":
                own.write_text("mine")
            case "folder":
                own.mkdir()
            case _:
                own.symlink_to("nowhere")
        with pytest.raises(UserInputError, match=f"(?s)no run of sftcore wrote.*{name}"):
            with open_run(load(path, None, str(own.parent)), purpose="training"):
                pass
        assert os.listdir(own.parent) == [name], "not even a lock is left"


def test_a_file_is_no_run_folder(path):
    with pytest.raises(UserInputError, match="can't be a run folder"):
        load(path, None, str(path))
    with pytest.raises(UserInputError, match="the run folder is a file"):
        check_free_for_run(path)


def test_a_runs_own_folder_is_found_again_with_its_own_recipe(path):
    recipe = load_recipe(path)
    run = recipe.run_folder
    claim(run, recipe)
    assert (run / "recipe.yaml").read_text().startswith(SEAL)
    check_free_for_run(run)
    assert load(run / "recipe.yaml", None, str(run)).seed == recipe.seed
    unsealed = (run / "recipe.yaml").read_text().partition("\n")[2]
    (run / "recipe.yaml").write_text(unsealed)
    check_free_for_run(run)  # of an earlier version: its environment.json tells
    (run / "environment.json").unlink()
    with pytest.raises(UserInputError, match="no run of sftcore wrote"):
        check_free_for_run(run)


@pytest.mark.parametrize("how", ["cut", "edited", "empty", "list", "folder", "nested", "bytes"])
def test_a_damaged_recipe_of_a_run_is_named(path, how):
    recipe = load_recipe(path)
    run = recipe.run_folder
    claim(run, recipe)
    (run / "metrics.jsonl").touch()
    file = run / "recipe.yaml"
    text = file.read_text()
    file.unlink()
    match how:
        case "cut":
            file.write_text(text[: text.index("batch:")])  # whole YAML, and whole lines
        case "edited":
            file.write_text(text.replace("lr: 0.01", "lr: 0.02"))
        case "folder":
            file.mkdir()
        case _:
            file.write_bytes({"empty": b"", "list": b"- a\n", "nested": b"[" * 9999, "bytes": b"\xff"}[how])
    for command in ("train", "evaluate", "probe"):
        done = sftcore(command, str(path))
        assert done.returncode == 2 and "recipe.yaml" in done.stderr, (how, done.stderr)
    done = sftcore("report", str(run))
    assert done.returncode == 2 and "recipe.yaml" in done.stderr
    with pytest.raises(UserInputError, match=r"recipe\.yaml"):
        read_run_recipe(run)


def test_what_killed_processes_left_goes_and_what_living_ones_write_stays(path):
    recipe = load_recipe(path)
    run = recipe.run_folder
    claim(run, recipe)
    left = [
        *("checkpoints/.step-000004.tmp/ds/x", "checkpoints/.step-000004.universal.tmp/ds/x"),
        *("checkpoints/step-000003/state.json", ".model.0a1b2c3d.tmp/model.safetensors"),
        *(".plan.json.0a1b2c3d.tmp", "eval/base/.scores.json.0a1b2c3d.tmp", "shards/0-of-2/.a.0a1b2c3d.tmp"),
    ]
    kept = ["checkpoints/step-000002/COMMITTED", "eval/base/scores.json", ".hidden"]
    for name in (*left, *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (run / ".link.0a1b2c3d.tmp").symlink_to("nowhere")
    with atomic_file(run / "report.html") as handle, atomic_folder(run / "best") as folder:
        (folder / "a").touch()
        sweep(run)
        handle.write("whole")
    assert (run / "report.html").read_text() == "whole" and (run / "best" / "a").is_file()
    assert all((run / name).is_file() for name in kept)
    assert not any((run / name).exists() for name in left)
    assert not list(run.rglob("*.tmp"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002"]


def test_jobs_that_share_a_run_remove_nothing(path):
    recipe = load_recipe(path)
    claim(recipe.run_folder, recipe)
    temporary = recipe.run_folder / ".scores.json.0a1b2c3d.tmp"
    temporary.touch()
    with open_run(recipe, purpose="evaluating a shard", shared=True):
        assert temporary.exists()
    with open_run(recipe, purpose="evaluation"):
        assert not temporary.exists()


def test_a_new_export_removes_the_half_of_a_killed_one(tmp_path):
    half = tmp_path / ".model.0a1b2c3d.tmp"
    living = tmp_path / ".model.11111111.tmp"
    for folder in (half, living):
        folder.mkdir()
    holder = os.open(living, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with atomic_folder(tmp_path / "model") as folder:
        write_json(folder / "config.json", {})
    os.close(holder)
    assert sorted(os.listdir(tmp_path)) == [".model.11111111.tmp", "model"]
