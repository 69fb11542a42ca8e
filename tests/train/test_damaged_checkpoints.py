"""Whatever is wrong with the newest checkpoint, the run goes on from the one before; no file is obeyed."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import run_cells, steps, weights_hash, write_recipe

from sftcore.errors import UserInputError
from sftcore.fsio import read_json, write_json
from sftcore.launcher.attempts import newest_step
from sftcore.recipe import load_recipe
from sftcore.stages.train import train_recipe
from sftcore.train.checkpoint import (
    COMMITTED,
    MANIFEST,
    STATE,
    checkpoint_folder,
    checkpoints_of,
    checksum,
    newest_usable,
    only_tensors_unpickled,
    prune,
    why_not_usable,
)
from sftcore.train.resumable import why_no_checkpoint

HOWS = ("empty", "cut", "flipped", "garbage", "folder", "gone", "link")
FILES = (COMMITTED, MANIFEST, STATE, "ds/mp_rank_00_model_states.pt", "ds/*optim_states.pt")


def damage(file: Path, how: str, seed: int = 0) -> None:
    """Damage a file in one of the ways that disks, people and other programs do it."""
    content = file.read_bytes()
    file.unlink()
    match how:
        case "empty":
            file.touch()
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "flipped":
            place = random.Random(seed).randrange(max(1, len(content)))
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "garbage":
            file.write_text('[{"step": "many"}, 3]\n')
        case "folder":
            file.mkdir()
        case "link":
            file.symlink_to("nowhere")


@pytest.fixture
def finished(tiny_recipe) -> Path:
    """A run with checkpoints of 3, 6 and 8 steps."""
    path = write_recipe(tiny_recipe, "run", checkpoint={"save_every_steps": 3, "keep": 3})
    train_recipe(load_recipe(path))
    return path


def test_any_damage_of_any_file_is_told_and_the_one_before_is_taken(finished, caplog):
    run = Path("runs/run")
    assert [int(f.name[5:]) for f in checkpoints_of(run)] == [3, 6, 8]
    assert newest_usable(run) == checkpoint_folder(run, 8)
    shutil.copytree(checkpoint_folder(run, 8), "good")
    for pattern in FILES:
        for how in HOWS:
            shutil.rmtree(checkpoint_folder(run, 8))
            shutil.copytree("good", checkpoint_folder(run, 8))
            (file,) = checkpoint_folder(run, 8).glob(pattern)
            damage(file, how)
            caplog.clear()
            if pattern == COMMITTED and how == "empty":
                assert newest_usable(run) == checkpoint_folder(run, 8), "as earlier versions wrote it"
                continue
            with caplog.at_level(logging.WARNING):
                assert newest_usable(run) == checkpoint_folder(run, 6), (pattern, how)
            assert f"skipping checkpoint {checkpoint_folder(run, 8)}: " in caplog.text


@pytest.mark.parametrize(
    "manifest",
    [{}, [], 3, None, {"a": 1}, {"state.json": [1]}, {"state.json": [2, 3]}, {"../x": [1, "a"]}],
)
def test_a_manifest_of_another_shape_is_no_checkpoint(finished, manifest):
    folder = checkpoint_folder(Path("runs/run"), 8)
    write_json(folder / MANIFEST, manifest)
    (folder / COMMITTED).write_text("")
    assert MANIFEST in why_not_usable(folder) or "missing" in why_not_usable(folder)
    assert newest_usable(Path("runs/run")) == checkpoint_folder(Path("runs/run"), 6)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": "8"}, {"world_size": None}, {"plan_settings": 3}, {"more": 1}]
)
def test_a_state_of_another_shape_is_no_checkpoint(finished, change):
    folder = checkpoint_folder(Path("runs/run"), 8)
    write_json(folder / STATE, read_json(folder / STATE) | change)
    commit(folder)
    assert "no state of a run" in why_not_usable(folder)


def commit(folder: Path) -> None:
    """Vouch for whatever lies there, as who means harm would."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in (MANIFEST, COMMITTED)]
    entries = {str(f.relative_to(folder)): [f.stat().st_size, checksum(f)] for f in sorted(files)}
    write_json(folder / MANIFEST, entries)
    (folder / COMMITTED).write_text(checksum(folder / MANIFEST))


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (1_000_000, 999_999, 50, 12_345_678):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
        (checkpoint_folder(tmp_path, step) / COMMITTED).touch()
    for name in ("step-000abc", "step-", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-99999999").touch()
    assert [int(f.name[5:]) for f in checkpoints_of(tmp_path)] == [50, 999_999, 1_000_000, 12_345_678]
    assert newest_step(tmp_path) == 12_345_678
    prune(tmp_path, keep=2)
    assert [int(f.name[5:]) for f in checkpoints_of(tmp_path)] == [1_000_000, 12_345_678]


def test_a_run_goes_on_behind_a_damaged_checkpoint_to_the_same_weights(finished):
    whole = weights_hash("run")
    shutil.rmtree("runs/run/model")
    (damaged,) = checkpoint_folder(Path("runs/run"), 8).glob("ds/*optim_states.pt")
    damage(damaged, "flipped")
    assert "resuming after step 6" in run_cells([finished], ranks=1)
    assert weights_hash("run") == whole and [s["step"] for s in steps("run")] == list(range(1, 9))


class Exploit:
    """What a pickle may ask for: any call, here one that makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("exploited"),)


def with_exploit(folder: Path, pattern: str) -> None:
    (file,) = folder.glob(pattern)
    content = torch.load(file, weights_only=False)
    content["exploit"] = Exploit()
    torch.save(content, file)
    commit(folder)


@pytest.mark.parametrize("pattern", ["ds/mp_rank_00_model_states.pt", "ds/*optim_states.pt"])
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_no_code_of_a_checkpoint_is_run(finished, pattern, resume):
    run = Path("runs/run")
    shutil.rmtree(run / "model")
    folder = checkpoint_folder(run, 8)
    with_exploit(folder, pattern)
    assert not why_not_usable(folder), "it is whole"
    (file,) = folder.glob(pattern)
    torch.load(file, weights_only=False)
    assert Path("exploited").exists(), "the pickle does what it says"
    Path("exploited").unlink()
    with pytest.raises(UserInputError, match="holds more than numbers"):
        train_recipe(load_recipe(finished), resume="auto" if resume == "auto" else str(folder))
    assert not Path("exploited").exists()


def test_no_code_of_a_checkpoint_is_run_when_it_is_converted(finished, tiny_recipe):
    from sftcore.train.checkpoint import _convert

    folder = checkpoint_folder(Path("runs/run"), 8)
    for pattern in ("ds/mp_rank_00_model_states.pt", "ds/*optim_states.pt"):
        with_exploit(folder, pattern)
        with pytest.raises(UserInputError, match="holds more than numbers"), only_tensors_unpickled(folder):
            _convert(folder / "ds", Path("converted"))
        assert not Path("exploited").exists()


def test_the_environment_is_as_before_and_can_not_switch_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "a.pt"
    torch.save({"x": Exploit()}, file)
    with pytest.raises(UserInputError, match="holds more than numbers"), only_tensors_unpickled(tmp_path):
        torch.load(file, weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_of_another_model_is_told(finished, tiny_recipe):
    adapter = write_recipe(tiny_recipe, "adapter", adapter={"kind": "lora", "r": 4})
    with pytest.raises(UserInputError, match="doesn't fit the model"):
        train_recipe(
            load_recipe(adapter), resume=str(checkpoint_folder(Path("runs/run"), 8)), restart_schedule=True
        )


@pytest.mark.parametrize("how", ["gap", "short", "garbage", "shape"])
def test_metrics_that_a_checkpoint_counts_are_not_half_used(finished, how):
    shutil.rmtree("runs/run/model")
    path = Path("runs/run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    match how:
        case "gap":
            path.write_text("".join(lines[:3] + lines[4:]))
        case "short":
            path.write_text("".join(lines[:6]))
        case "garbage":
            path.write_text("".join(lines[:3]) + "\x00\x00\n" + "".join(lines[4:]))
        case _:
            path.write_text("".join(lines[:7]) + json.dumps({"step": "8"}) + "\n")
    with pytest.raises(UserInputError, match=r"metrics\.jsonl"):
        train_recipe(load_recipe(finished))


def test_a_torn_line_behind_the_checkpoint_is_mended(finished):
    whole = weights_hash("run")
    shutil.rmtree("runs/run/model")
    shutil.rmtree(checkpoint_folder(Path("runs/run"), 8))
    path = Path("runs/run/metrics.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    train_recipe(load_recipe(finished))
    assert weights_hash("run") == whole and [s["step"] for s in steps("run")] == list(range(1, 9))


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(finished, monkeypatch):
    """A power cut leaves what was synced: metrics are, each time before COMMITTED appears."""
    from sftcore.train import checkpoint, metrics

    order: list[str] = []
    sync, commit_ = metrics.sync_file, checkpoint._commit
    monkeypatch.setattr(metrics, "sync_file", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(checkpoint, "_commit", lambda *args: (order.append("commit"), commit_(*args)))
    shutil.rmtree("runs/run")
    train_recipe(load_recipe(finished))
    assert order == ["metrics.jsonl", "commit"] * 3


def test_what_is_no_checkpoint_is_told_for_what_it_is(tiny_recipe):
    """... with those that there are, of the path's run or of one's own."""
    step = checkpoint_folder(Path("runs/other"), 3)
    step.mkdir(parents=True)
    own = checkpoint_folder(Path("runs/run"), 2)
    own.mkdir(parents=True)
    Path("elsewhere").mkdir()
    Path("file").touch()
    for path, told in {
        "gone": f"there is nothing .*{own}",
        "file": f"this is a file.*{own}",
        "elsewhere": f"this folder is no checkpoint .*{own}",
        "runs/other": f"holds a run's checkpoints and is none of them .*{step}",
        "runs/other/checkpoints": f"holds a run's checkpoints and is none of them .*{step}",
    }.items():
        assert re.search(told, why_no_checkpoint(Path(path), Path("runs/run"))), path
    assert not why_no_checkpoint(step, Path("runs/run"))
    recipe = load_recipe(write_recipe(tiny_recipe, "new"))
    for path, told in {"runs/other": f"this folder.*{step}", str(step): "the save was interrupted"}.items():
        with pytest.raises(UserInputError, match=f"can't resume: {told}"):
            train_recipe(recipe, resume=path)
