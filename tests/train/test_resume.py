"""Going on from a checkpoint: another number of ranks, another plan, and a disk that was full."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from launching import BIN, run, run_cells, steps, weights, write_recipe

from sftcore.batching.schedule import Schedule
from sftcore.errors import UserInputError
from sftcore.fsio import write_json
from sftcore.recipe import load_recipe
from sftcore.stages.train import train_recipe
from sftcore.train.checkpoint import TrainState
from sftcore.train.resumable import check_resumable

SIZES = {
    "full0": {"deepspeed": "zero0"},
    "full1": {"deepspeed": "zero1"},
    "full2": {"deepspeed": "zero2"},
    "full3": {"deepspeed": "all3.json"},
    "bf16": {"deepspeed": "zero1", "model": {"dtype": "bfloat16"}},
    "lora2": {"deepspeed": "zero2", "adapter": {"kind": "lora", "r": 4}},
    "lora3": {"deepspeed": "all3.json", "adapter": {"kind": "lora", "r": 4}},
}


def cut_after(names: list[str], step: int) -> None:
    """Take away what runs made after `step`, as if they had been killed there."""
    for name in names:
        for folder in (Path("runs") / name).glob("checkpoints/step-*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        for result in ("model", "adapter"):
            shutil.rmtree(Path("runs") / name / result, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_another_number_of_ranks_continues_the_same_mathematics(tiny_recipe, before, after):
    """Cut after 3 of 8 steps; the losses of the others are those of the run that was not cut."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    write_json(Path("all3.json"), {"zero_optimization": zero})
    base = {"train": {"lr": 2e-3, "weight_decay": 0.5}, "checkpoint": {"save_every_steps": 3, "keep": 9}}
    paths = [write_recipe(tiny_recipe, name, **base, **changes) for name, changes in SIZES.items()]
    run_cells(paths, ranks=before)
    losses = {name: [s["loss"] for s in steps(name)] for name in SIZES}
    last = {name: weights(name) for name in SIZES}
    cut_after(list(SIZES), 3)
    text = run_cells(paths, ranks=after)
    assert text.count("resuming after step 3") == len(SIZES)
    assert text.count("converting the checkpoint") == len(SIZES) - 1, "stage 0 needs no conversion"
    for name in SIZES:
        rel = 2e-2 if name == "bf16" else 2e-5
        assert [s["loss"] for s in steps(name)] == pytest.approx(losses[name], rel=rel), name
        for key, tensor in weights(name).items():
            difference = (tensor.float() - last[name][key].float()).abs().max()
            assert difference < (2e-2 if name == "bf16" else 5e-5), (name, key)
        assert not list((Path("runs") / name / "checkpoints").glob(".*")), "the converted form is gone"


@pytest.mark.slow
def test_another_plan_is_refused_with_what_differs_and_can_be_restarted(tiny_recipe):
    first = write_recipe(tiny_recipe, "first", train={"epochs": 1})
    run_cells([first], ranks=1)
    checkpoint = "runs/first/checkpoints/step-000004"
    second = load_recipe(write_recipe(tiny_recipe, "second", seed=4, batch={"samples_per_step": 2}))
    with pytest.raises(UserInputError, match=r"(?s)got: seed 4, train.epochs 2, batch.samples_per_step 2"):
        train_recipe(second, resume=checkpoint)
    with pytest.raises(UserInputError, match="name the checkpoint"):
        train_recipe(second, restart_schedule=True)
    train_recipe(second, resume=checkpoint, restart_schedule=True)
    assert len(steps("second")) == 16
    assert steps("second")[0]["loss"] < steps("first")[0]["loss"], "it began with trained weights"


@pytest.mark.slow
def test_a_full_disk_is_explained_and_the_earlier_checkpoint_is_intact(tiny_recipe, tmp_path):
    """A tmpfs with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        path = write_recipe(tiny_recipe, "full", checkpoint={"save_every_steps": 2, "keep": 5})
        done = run(str(BIN / "sftcore"), "train", str(path), "--run", str(disk / "run"))
        assert done.returncode == 3, done.stderr[-3000:]
        assert "can't write" in done.stderr and "free space" in done.stderr
        assert "Traceback" not in done.stderr
        left = sorted(f.name for f in (disk / "run/checkpoints").iterdir())
        assert left == ["step-000002"]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        resumed = run(str(BIN / "sftcore"), "train", str(path), "--run", str(disk / "run"))
        assert resumed.returncode == 0 and "resuming after step 2" in resumed.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_with_its_message(tiny_recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        path = write_recipe(tiny_recipe, "full", checkpoint={"save_every_steps": 2, "keep": 1})
        node = ["--on", "node", "--ranks-per-node", "2"]
        done = run(str(BIN / "sftcore"), "train", str(path), "--run", str(disk / "run"), *node)
        assert done.returncode == 3, (done.returncode, (done.stdout + done.stderr)[-3000:])
        said = [log.read_text() for log in (disk / "run" / "logs").rglob("*") if log.is_file()]
        said += [done.stderr, done.stdout]  # rank 0's; it may only have lost the other one
        assert "earlier checkpoint is intact" in "".join(said), said
        left = sorted(f.name for f in (disk / "run/checkpoints").iterdir())
        assert [name for name in left if name.endswith(".tmp")] == [], left
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        again = run(str(BIN / "sftcore"), "train", str(path), "--run", str(disk / "run"), *node)
        assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_that_names_its_plan_as_earlier_versions_did_goes_on():
    def plan(lengths: list[int]) -> Schedule:
        trained = [1] * len(lengths)
        return Schedule(
            lengths=lengths, num_trained=trained, capacity=8, seed=1, epochs=1, world=1, samples_per_step=2
        )

    schedule = plan([3, 1, 2])
    known = {"step": 1, "epoch": 0, "world_size": 1, "num_threads": 1, "plan_settings": {"seed": 1}}
    for name in (schedule.fingerprint, schedule.earlier_fingerprint):
        state = TrainState(plan_fingerprint=name, **known)
        check_resumable(Path("step-000001"), state, schedule=schedule, plan_settings={"seed": 1})
        with pytest.raises(UserInputError, match="belongs to another plan"):
            check_resumable(Path("step-000001"), state, schedule=plan([3, 2, 1]), plan_settings={"seed": 1})
