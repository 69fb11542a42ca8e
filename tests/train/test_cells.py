"""The compatibility matrix, walked: each cell that runs is trained by two ranks and by one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, run_cells, steps, weights, write_recipe

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.fsio import read_json
from sftcore.recipe import DS_CONFIGS
from sftcore.train.compatibility import KINDS, ROWS, cells, check_combination, check_machine, table
from sftcore.train.ds_config import read_ds_config

ADAPTER = {"r": 4, "alpha": 16}
NUM_FULL = 300 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32  # tied head
NUM_ADAPTER = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # q o, k v, gate up down


def sharding_everything(name: str) -> str:
    """A shipped configuration for a tiny model: small weights sharded, too; many buckets, some too small."""
    config = read_ds_config(DS_CONFIGS / f"{name}.json")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage == 0:
        return name
    config["zero_optimization"]["reduce_bucket_size"] = 1000  # the embedding has 9,600 elements
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    Path(f"{name}-all.json").write_text(json.dumps(config))
    return f"{name}-all.json"


def cell_changes(kind: str, name: str, checkpointing: str) -> dict:
    train = {"epochs": 1, "lr": 2e-3, "max_grad_norm": 0.3, "weight_decay": 5.0}
    train["activation_checkpointing"] = checkpointing
    return {
        "adapter": {"kind": kind, **ADAPTER},
        "deepspeed": sharding_everything(name),
        "train": train,
        "batch": {"samples_per_step": 8, "capacity": 100},
        "checkpoint": {"save_every_steps": 100},
    }


def test_every_cell_runs_with_two_ranks_as_with_one_process(tiny_recipe):
    """16 samples: two steps of 8 in packs of at most 100 tokens, several micro-batches on both ranks."""
    walked = [(kind, name, c) for kind, name in cells() for c in ("none", "full")]
    assert len(walked) == 36
    two = [write_recipe(tiny_recipe, f"two-{'-'.join(w)}", **cell_changes(*w)) for w in walked]
    one = [write_recipe(tiny_recipe, f"one-{k}", **cell_changes(k, "zero1", "none")) for k in KINDS]
    run_cells(one, ranks=1)
    run_cells(two, ranks=2)
    for cell in walked:
        check_cell(f"one-{cell[0]}", f"two-{'-'.join(cell)}", kind=cell[0])


def check_cell(one: str, two: str, *, kind: str) -> None:
    alone, together = steps(one), steps(two)
    assert len(together) == 2 and together[0]["num_packs"] > 2, "several micro-batches"
    assert together[1]["loss"] < together[0]["loss"], two
    assert max(s["grad_norm"] for s in alone) > 0.3 or kind != "none", "clipping bites"
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), two
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3), two
    first, second = weights(one), weights(two)
    assert sum(t.numel() for t in second.values()) == (NUM_FULL if kind == "none" else NUM_ADAPTER), two
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=2e-5), (two, name)


def test_the_matrix_and_the_shipped_configurations_are_the_same_rows():
    assert sorted(ROWS) == sorted(file.stem for file in DS_CONFIGS.glob("*.json"))


def test_what_the_machine_lacks_is_refused_with_the_remedy():
    for name, need in ROWS.items():
        config = read_ds_config(DS_CONFIGS / f"{name}.json")
        check_machine(config, has_cuda=True, has_async_io=True)
        if need is None:
            check_machine(config, has_cuda=False, has_async_io=False)
            continue
        with pytest.raises(MissingEnvironmentError, match=re.escape(need.remedy)):
            check_machine(config, has_cuda=False, has_async_io=False)


def test_muon_is_refused_where_its_state_would_be_cut():
    for name in ROWS:
        config = read_ds_config(DS_CONFIGS / f"{name}.json")
        check_combination(config, "adamw", has_cuda=True, has_async_io=True)
        if name == "zero0":
            check_combination(config, "muon", has_cuda=True, has_async_io=True)
            continue
        with pytest.raises(UserInputError, match="set deepspeed: zero0"):
            check_combination(config, "muon", has_cuda=True, has_async_io=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_zeropp_without_a_gpu_fails_upstream_and_is_refused_by_us(tiny_recipe):
    path = write_recipe(tiny_recipe, "pp", deepspeed="zeropp")
    guarded = run(str(ROOT / ".venv/bin/sftcore"), "train", str(path))
    assert guarded.returncode == 3 and "take deepspeed: zero3" in guarded.stderr, guarded.stderr
    config = read_json(DS_CONFIGS / "zeropp.json")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["zero_optimization"]["zero_hpz_partition_size"] = 1
    Path("pp.json").write_text(json.dumps(config))
    path = write_recipe(tiny_recipe, "unguarded", deepspeed="pp.json")
    with pytest.raises(AssertionError, match=re.escape(ROWS["zeropp"].without.partition(": ")[2])):
        run_cells(["--unguarded", path], ranks=2)


def test_the_readme_shows_the_table():
    assert table() in (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
