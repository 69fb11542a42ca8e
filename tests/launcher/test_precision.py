"""`model.dtype: auto`: decided by hardware once, kept by the run; slow choices are named."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sftcore import precision
from sftcore.config import ModelSettings
from sftcore.errors import UserInputError
from sftcore.launcher.cli import app
from sftcore.launcher.study import load_study
from sftcore.model.load import load_for_decoding
from sftcore.recipe import load_recipe
from sftcore.runs.settle import check_dtype, settle, settle_runs

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def auto(recipe: dict) -> dict:
    return recipe | {"model": {"path": recipe["model"]["path"]}}


def written(recipe: dict, name: str = "recipe.yaml") -> Path:
    path = Path(name)
    path.write_text(yaml.safe_dump(recipe))
    return path


def pretend(monkeypatch, dtype: str) -> None:
    """This machine's answer."""
    monkeypatch.setattr(precision, "dtype_here", lambda: dtype)


@pytest.mark.parametrize(
    ("flags", "limited", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, False, True),
        ({"architecture": "x86_64", "amx_bf16": True}, False, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, False, False),
        ({"architecture": "x86_64", "avx2": True}, False, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True, False),
    ],
)
def test_flags_decide_on_x86(monkeypatch, flags, limited, expected):
    """... and nothing is timed there."""
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(precision, "_libraries_use_it", lambda: not limited)
    monkeypatch.setattr(precision, "matmul_rate", None)
    assert precision.has_fast_bfloat16.__wrapped__() is expected


def test_a_cpu_without_known_flags_is_measured(monkeypatch):
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: {"architecture": "riscv64"})
    for rates, expected in (
        ({"bfloat16": 2.0, "float32": 1.0}, True),
        ({"bfloat16": 1.0, "float32": 2.0}, False),
    ):
        monkeypatch.setattr(precision, "matmul_rate", rates.get)
        assert precision.has_fast_bfloat16.__wrapped__() is expected


def test_limited_libraries_take_float32():
    """A real process that may not use AVX-512 holds a model in float32, whatever the CPU has."""
    code = "from sftcore.precision import dtype_here; print(dtype_here())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | AVX2, capture_output=True, text=True)
    assert done.stdout.split() == ["float32"], done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_decided_is_written_loaded_and_kept(tiny_recipe, monkeypatch, dtype):
    """Recipe, plan, levels; a run that goes on elsewhere keeps it."""
    other = {"bfloat16": "float32", "float32": "bfloat16"}[dtype]
    pretend(monkeypatch, dtype)
    path = written(auto(tiny_recipe))
    assert CliRunner().invoke(app, ["probe", str(path)], catch_exceptions=False).exit_code == 0
    run = Path("runs/tiny")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["dtype"] == dtype
    assert json.loads((run / "levels.manifest.json").read_text())["dtype"] == dtype
    planned = CliRunner().invoke(app, ["plan", str(path), "--json"], catch_exceptions=False)
    assert json.loads(planned.stdout)["predictions"]["dtype"] == dtype
    pretend(monkeypatch, other)
    assert settle(load_recipe(path)).model.dtype == dtype
    assert settle(load_recipe(path, ["name=new"])).model.dtype == other


def test_auto_loads_what_it_stands_for(tiny_model_folder, monkeypatch):
    for dtype in ("bfloat16", "float32"):
        pretend(monkeypatch, dtype)
        assert str(load_for_decoding(ModelSettings(path=str(tiny_model_folder))).dtype) == f"torch.{dtype}"


def test_a_cluster_decides_where_it_computes(tiny_recipe, monkeypatch):
    """GPUs of its nodes are asked for by name; the login node's CPU decides nothing."""
    pretend(monkeypatch, "float32")
    recipe = load_recipe(written(auto(tiny_recipe)))
    assert settle(recipe, on="slurm", has_gpu=True).model.dtype == "bfloat16"
    assert settle(recipe, on="slurm").model.dtype == "auto"
    assert settle(recipe, on="node").model.dtype == "float32"
    assert settle(recipe, has_gpu=True).model.dtype == "bfloat16"


def test_a_plan_for_a_gpu_is_one_in_bfloat16(tiny_recipe, monkeypatch):
    pretend(monkeypatch, "float32")
    path = written(auto(tiny_recipe))
    for more, expected in ((["--gpu", "h100"], "bfloat16"), ([], "float32")):
        planned = CliRunner().invoke(app, ["plan", str(path), "--json", *more], catch_exceptions=False)
        assert json.loads(planned.stdout)["predictions"]["dtype"] == expected


def test_a_study_does_not_mix_dtypes(tiny_recipe, monkeypatch):
    """Begun on one machine, it goes on with the same dtype on another, runs not yet begun included."""
    base = written(auto(tiny_recipe), "base.yaml")
    study = written({"base": str(base), "grid": {"train.epochs": [1, 2]}}, "study.yaml")
    pretend(monkeypatch, "bfloat16")
    first = load_study(study).runs[0].recipe
    assert first.model.dtype == "bfloat16"
    first.run_folder.mkdir(parents=True)
    written(first.model_dump(mode="json"), str(first.run_folder / "recipe.yaml"))
    pretend(monkeypatch, "float32")
    assert [run.recipe.model.dtype for run in load_study(study).runs] == ["bfloat16", "bfloat16"]
    assert {run.recipe.model.dtype for run in load_study(study, "elsewhere").runs} == {"float32"}
    assert settle_runs([]) == []


def test_a_slow_dtype_that_was_asked_for_is_named(tiny_recipe, monkeypatch, caplog):
    recipe = load_recipe(written(tiny_recipe | {"model": {**tiny_recipe["model"], "dtype": "bfloat16"}}))
    for here, expected in (("float32", 1), ("bfloat16", 0)):
        pretend(monkeypatch, here)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert settle(recipe).model.dtype == "bfloat16"
            settle(recipe, has_gpu=True)
            settle(recipe, on="slurm", has_gpu=True)
            settle(recipe, on="node")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RANK", "1")
                settle(recipe)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * expected


def test_a_named_checkpoint_of_another_run_decides_and_is_not_cast(tiny_recipe, monkeypatch):
    """Of this version, of one that did not write its dtype, and where nothing is known."""
    step = Path("runs/old/checkpoints/step-000002")
    step.mkdir(parents=True)
    path = written(auto(tiny_recipe))
    pretend(monkeypatch, "float32")
    assert settle(load_recipe(path), resume=str(step)).model.dtype == "float32", "nothing is known"
    owner = load_recipe(path).model_dump(mode="json")
    written(owner | {"model": owner["model"] | {"dtype": "bfloat16"}}, str(step.parents[1] / "recipe.yaml"))
    for state in ({"step": 2}, {"step": 2, "dtype": "bfloat16"}):
        (step / "state.json").write_text(json.dumps(state))
        decided = settle(load_recipe(path), resume=str(step))
        assert decided.model.dtype == "bfloat16"
        check_dtype(decided, step)
        asked = load_recipe(path, ["model.dtype=float32"])
        told = "(?s)another dtype.*got: model.dtype float32.*set model.dtype: bfloat16"
        with pytest.raises(UserInputError, match=told):
            check_dtype(settle(asked, resume=str(step)), step)
