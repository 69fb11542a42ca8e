"""Whole runs on a tiny model: two ranks equal one process; resumed equals uninterrupted, to the bit."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from launching import (
    BIN,
    ENVIRONMENT,
    ROOT,
    launcher,
    run,
    run_cells,
    steps,
    weights,
    weights_hash,
    write_recipe,
)
from safetensors.torch import load_file
from warm import Process

from sftcore.fsio import read_json
from sftcore.train.checkpoint import newest_usable, why_not_usable

CELLS = [
    (stage, dtype) for stage in ("zero0", "zero1", "zero2", "zero3") for dtype in ("float32", "bfloat16")
]


BATCHES = {  # 16 samples of 55 or 56 tokens, two to a pack; both divisors, both modes
    "float32": ({"samples_per_step": 7, "capacity": 120}, "sample", [7, 7, 2]),
    "bfloat16": ({"tokens_per_step": 360, "capacity": 120}, "token", [6, 6, 4]),
}


def test_two_ranks_equal_one_process_in_every_stage_and_dtype(tiny_recipe):
    """Both ranks run several micro-batches; with three packs a step, one of them idles."""
    recipes = {"one": [], "two": []}
    for stage, dtype in CELLS:
        for ranks, paths in recipes.items():
            batch, normalise, _ = BATCHES[dtype]
            changes = {"model": {"dtype": dtype}, "batch": {"samples_per_step": None} | batch}
            changes |= {"train": {"max_grad_norm": 0.3, "normalise": normalise}}
            paths.append(write_recipe(tiny_recipe, f"{ranks}-{stage}-{dtype}", deepspeed=stage, **changes))
    run_cells(recipes["one"], ranks=1)
    run_cells(recipes["two"], ranks=2)
    initial = load_file(Path(tiny_recipe["model"]["path"]) / "model.safetensors")
    for stage, dtype in CELLS:
        check_cell(f"one-{stage}-{dtype}", f"two-{stage}-{dtype}", dtype, initial)


def check_cell(one: str, two: str, dtype: str, initial: dict[str, torch.Tensor]) -> None:
    rel = 2e-5 if dtype == "float32" else 3e-2
    alone, together = steps(one), steps(two)
    batch, _, num_samples = BATCHES[dtype]
    assert [s["num_samples"] for s in alone] == [s["num_samples"] for s in together] == 2 * num_samples
    assert together[0]["num_packs"] > 2, "several micro-batches"
    assert together[0]["num_packs"] == (3 if "tokens_per_step" in batch else 4), "a rank idles, or none does"
    assert max(s["grad_norm"] for s in alone) > 0.3, "clipping bites"
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=rel), (two, a["step"])
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * rel), (two, a["step"])
        assert b["num_trained_tokens"] == a["num_trained_tokens"]
    assert alone[-1]["loss"] < alone[0]["loss"]
    first, second = weights(one), weights(two)
    for name, tensor in first.items():
        assert tensor.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        moved = (tensor.float() - initial[name].float()).abs().max()
        assert (tensor.float() - second[name].float()).abs().max() <= max(50 * rel * moved.item(), 1e-5), name
    assert (
        read_json(Path("runs") / one / "plan.json")["fingerprint"]
        == (read_json(Path("runs") / two / "plan.json")["fingerprint"])
    )


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tiny_recipe):
    changes = {"train": {"epochs": 10}, "model": {"dtype": "bfloat16"}, "checkpoint": {"save_every_steps": 4}}
    whole, cut = (write_recipe(tiny_recipe, name, **changes) for name in ("whole", "cut"))
    done = run(str(BIN / "sftcore"), "train", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    process = Process([str(BIN / "sftcore"), "train", str(cut)], ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (Path("runs/cut/checkpoints/step-000008/COMMITTED")).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("runs/cut/model").exists(), "killed in the middle"
    cold = ENVIRONMENT | {"PYTHONHASHSEED": "5"}  # a new process, whose sets have another order
    resumed = warm.run([str(BIN / "sftcore"), "train", str(cut)], env=cold)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming after step" in resumed.stderr
    assert weights_hash("cut") == weights_hash("whole")
    assert [s["loss"] for s in steps("cut")] == [s["loss"] for s in steps("whole")]
    assert [s["step"] for s in steps("cut")] == list(range(1, 41))


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped_for_the_newest_that_verifies(tiny_recipe, caplog):
    path = write_recipe(tiny_recipe, "again", checkpoint={"save_every_steps": 3, "keep": 2})
    assert run(str(BIN / "sftcore"), "train", str(path)).returncode == 0
    exported = weights_hash("again")
    folder = Path("runs/again/checkpoints/step-000008")
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    assert newest_usable(Path("runs/again")) == folder
    for damaged, reason in (
        (content[:-10], "bytes instead of"),
        (b"", "0 bytes instead of"),
        (bytes(flipped), "wrong checksum"),
    ):
        file.write_bytes(damaged)
        assert newest_usable(Path("runs/again")).name == "step-000006"
        assert reason in caplog.text
    file.unlink()
    assert "is missing" in why_not_usable(folder)
    (folder / "MANIFEST.json").write_text("{")
    assert "MANIFEST.json: not valid JSON" in why_not_usable(folder)
    (folder / "COMMITTED").unlink()
    assert "interrupted" in why_not_usable(folder)
    shutil.rmtree("runs/again/model")
    resumed = run(str(BIN / "sftcore"), "train", str(path))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "step-000008: the save was interrupted" in resumed.stderr
    assert "resuming after step 6" in resumed.stderr
    assert weights_hash("again") == exported
    again = run(str(BIN / "sftcore"), "train", str(path))
    assert again.returncode == 0 and "is finished" in again.stderr
    other = run(str(BIN / "sftcore"), "train", str(path), "--set", "train.lr=1.0e-3")
    assert other.returncode == 2 and "another train.lr" in other.stderr


def test_the_worker_line_works_as_typed_and_reports_wrong_input(tiny_recipe):
    path = write_recipe(tiny_recipe, "typed")
    worker = str(ROOT / "launcher" / "worker.py")
    done = run(*launcher(2), worker, str(path))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert len(steps("typed")) == 8 and Path("runs/typed/model/config.json").exists()
    wrong = run(sys.executable, worker, "--local_rank=0", str(path), "--set", "train.lr=0")
    assert wrong.returncode == 2 and "train.lr" in wrong.stderr and "Traceback" not in wrong.stderr
