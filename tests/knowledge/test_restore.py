"""Restoration equals a brute-force sort; memory is flat; bad folders are refused."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.knowledge.restore import change_bits, restore
from sftcore.model import weights as streamer
from sftcore.model.weight_files import check_unchanged, write_checksums
from sftcore.settings import CHECKSUMS


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard}.safetensors", metadata={"format": "pt"})
    return folder


def weights(seed: int, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (50, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.1.mlp.up_proj.weight": (16, 8),
        "model.norm.weight": (8,),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def tune(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A few weights untouched, some zero before, most changed a little, many by equal ratios."""
    torch.manual_seed(9)
    tuned = {name: t + 0.05 * torch.randn(t.shape).to(t.dtype) for name, t in base.items()}
    tuned["model.norm.weight"] = base["model.norm.weight"] * 2  # eight ties at ratio 1
    tuned["model.embed_tokens.weight"][:3] = base["model.embed_tokens.weight"][:3]
    return tuned


def by_brute_force(base, tuned, count: int) -> dict[str, torch.Tensor]:
    """Sort all changes, largest first, ties in file order; put the first `count` back."""
    names = sorted(base)
    p, s = (torch.cat([part[name].flatten() for name in names]).float() for part in (base, tuned))
    ratio = ((s - p) / p).abs()
    ratio[p == s] = 0
    order = torch.argsort(ratio, descending=True, stable=True)[:count]
    mixed = s.clone()
    mixed[order] = p[order]
    parts = mixed.split([base[name].numel() for name in names])
    return {
        name: part.view(base[name].shape).to(tuned[name].dtype)
        for name, part in zip(names, parts, strict=True)
    }


@pytest.mark.parametrize("chunk", [7, 2**22])  # stretches that end inside tensors, and one for all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_restored_weights_are_those_of_a_full_sort(tmp_path, monkeypatch, chunk, dtype):
    monkeypatch.setattr(streamer, "CHUNK", chunk)
    base = weights(1, dtype)
    base["model.layers.0.mlp.up_proj.weight"][:2] = 0
    tuned = tune(base)
    a = write_folder(tmp_path / "base", base)
    b = write_folder(tmp_path / "tuned", tuned, shards=2)
    percents = [0, 1, 3, 5, 10, 20, 40, 60, 100]
    reports = restore(a, b, {percent: tmp_path / f"q{percent}" for percent in percents})
    total = sum(t.numel() for t in base.values())
    for percent in percents:
        files = sorted((tmp_path / f"q{percent}").glob("*.safetensors"))
        found = {name: t for file in files for name, t in load_file(file).items()}
        expected = by_brute_force(base, tuned, round(percent / 100 * total))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (percent, name)
        report = json.loads((tmp_path / f"q{percent}" / "restore.json").read_text())
        assert report["num_restored"] == round(percent / 100 * total) == sum(report["by_layer"].values())
        assert report["by_module"] == reports[percent]["by_module"]
        assert (tmp_path / f"q{percent}" / "config.json").exists()
    assert reports[100]["by_layer"] == {"none": 408, "0": 128, "1": 128}
    assert reports[0]["threshold"] is None and reports[0]["num_restored"] == 0
    same = sum(int((base[name].float() == tuned[name].float()).sum()) for name in base)
    assert reports[1]["num_changed"] == total - same < total
    assert reports[1]["threshold"] == "inf" and reports[100]["threshold"] == 0


def test_a_folder_that_can_not_be_finished_does_not_appear_and_others_carry_checksums(tmp_path, monkeypatch):
    a, b = write_folder(tmp_path / "base", weights(1)), write_folder(tmp_path / "tuned", tune(weights(1)))
    write_checksums(b)
    restore(a, b, {5: tmp_path / "q5"})
    check_unchanged(tmp_path / "q5")
    assert (tmp_path / "q5" / CHECKSUMS).read_text() != (b / CHECKSUMS).read_text()

    def fail(folder: Path) -> None:
        assert (folder / "restore.json").is_file(), "it is the last step"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streamer, "write_checksums", fail)
    with pytest.raises(MissingEnvironmentError, match="No space left"):
        restore(a, b, {5: tmp_path / "full"})
    assert not (tmp_path / "full").exists()


def test_ties_at_the_threshold_are_taken_in_file_order(tmp_path):
    base = {"a": torch.ones(6), "b": torch.ones(6)}
    tuned = {name: t * 2 for name, t in base.items()}
    a, b = write_folder(tmp_path / "a", base), write_folder(tmp_path / "b", tuned)
    restore(a, b, {75: tmp_path / "q"})
    found = load_file(tmp_path / "q" / "model-0.safetensors")
    assert found["a"].tolist() == [1] * 6 and found["b"].tolist() == [1, 1, 1, 2, 2, 2]


def test_changes_are_ordered_and_odd_ones_have_their_place():
    p = torch.tensor([0.0, 0.0, 1.0, 1.0, -2.0, 1.0])
    s = torch.tensor([0.0, 1.0, 1.0, 1.5, -1.0, float("nan")])
    bits = change_bits(p, s)
    assert bits[0] == bits[2] == 0 and bits[3] == bits[4] and bits[3] < bits[1] < bits[5]
    assert bits[1] == np.float32(np.inf).view(np.uint32)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    a = write_folder(tmp_path / "a", weights(1))
    with pytest.raises(
        UserInputError, match=r"(?s)--fraction: a percentage.*got: 101.*--to .*/a: this folder"
    ):
        restore(a, a, {101: tmp_path / "q", 1: a})


@pytest.mark.parametrize("inside", ["base", "tuned"])
def test_a_target_inside_a_folder_that_is_read_is_refused(tmp_path, inside):
    folders = [write_folder(tmp_path / name, weights(i)) for i, name in enumerate(("base", "tuned"))]
    (tmp_path / "link").symlink_to(tmp_path / inside)
    for target in (tmp_path / inside / "q", tmp_path / "link" / "deep" / "q"):
        with pytest.raises(UserInputError, match=f"--to .*/q: this lies in the folder of --{inside}"):
            restore(*folders, {1: target})
        assert sorted(p.name for p in (tmp_path / inside).iterdir()) == ["config.json", "model-0.safetensors"]


def test_equal_weights_are_refused_and_few_changes_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sftcore"), "propagate", True)
    base = weights(1)
    few = {name: t.clone() for name, t in base.items()}
    few["model.norm.weight"][:3] *= 2
    a, b, c = (write_folder(tmp_path / n, t) for n, t in (("a", base), ("b", base), ("c", few)))
    with pytest.raises(UserInputError, match="nothing changed: both folders hold the same weights"):
        restore(a, b, {0: tmp_path / "q0", 1: tmp_path / "q1"})
    assert not (tmp_path / "q0").exists()
    assert restore(a, b, {0: tmp_path / "q0"})[0]["num_restored"] == 0
    assert not caplog.messages
    reports = restore(a, c, {0.1: tmp_path / "q", 10: tmp_path / "q10"})
    assert [report["num_changed"] for report in reports.values()] == [3, 3]
    assert caplog.messages == [
        "3 weights changed; 10 % asks for 66, so unchanged ones count among those restored"
    ]


def test_folders_of_different_models_are_refused(tmp_path):
    a = write_folder(tmp_path / "a", weights(1))
    other = weights(1) | {"model.norm.weight": torch.ones(9), "lm_head.weight": torch.ones(3)}
    b = write_folder(tmp_path / "b", other)
    with pytest.raises(UserInputError, match="2 tensors are not in both folders"):
        restore(a, b, {1: tmp_path / "q"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserInputError, match="no safetensors files"):
        restore(a, tmp_path / "empty", {1: tmp_path / "q"})
    assert not (tmp_path / "q").exists()


def test_damaged_files_are_refused(tmp_path):
    a = write_folder(tmp_path / "a", weights(1))
    b = write_folder(tmp_path / "b", weights(1))
    file = b / "model-0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserInputError, match="cut off"):
        restore(a, b, {1: tmp_path / "q"})
    file.write_bytes(b"not a header at all")
    with pytest.raises(UserInputError, match="not a safetensors file"):
        restore(a, b, {1: tmp_path / "q"})


@pytest.mark.slow
def test_memory_stays_below_a_gigabyte_on_two_gigabytes(tmp_path):
    """A tensor of 2 GB in one file; in a process of its own, whose peak is what it used."""
    code = """
import sys
from pathlib import Path
from sftcore import dist
from sftcore.knowledge.restore import restore
restore(Path(sys.argv[1]), Path(sys.argv[2]), {5: Path(sys.argv[3])})
print(dist.peak_memory_bytes())
"""
    for name, scale in (("base", 1.0), ("tuned", 1.25)):
        (tmp_path / name).mkdir()
        save_file(
            {"w": torch.full((2**15, 2**15), scale, dtype=torch.bfloat16)}, tmp_path / name / "m.safetensors"
        )
    folders = [str(tmp_path / name) for name in ("base", "tuned", "q")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    assert (tmp_path / "q" / "m.safetensors").stat().st_size > 2**31
    assert peak < 2**30, f"{peak} bytes"
