"""What transformers keeps in float32 stays so in a bfloat16 model: while it trains, in exports and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import config_of
from launching import run_cells, steps, weights, write_recipe
from miniature_runs import exported, pack_of, recipe_for, save_base
from safetensors.torch import load_file

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.model.merge import merge_adapter
from sftcore.train.engine import Engine

FAMILIES = {"beam": "mlp.gate.weight", "ernie4_5_moe": "mlp.gate.weight", "glm4_moe": None}
STAGES = [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))]
BIAS = "e_score_correction_bias"


def recipe_of(folder: Path, stage: int, **changes: Any) -> Recipe:
    model = {"path": str(folder), "dtype": "bfloat16"}
    return recipe_for(folder, model=model, deepspeed=f"zero{stage}", **changes)


def take_three_steps(engine: Engine) -> None:
    losses = [engine.step([pack_of(0)], seeds=[0], rates={"lr": 1e-3}).loss for _ in range(3)]
    assert losses[2] < losses[0]


def trained(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """Three steps, exported: what was in memory of parameters and buffers that are kept in float32."""
    held = exported(recipe, folder, take_three_steps)
    kept = (BIAS, FAMILIES[Path(recipe.model.path).name] or BIAS)
    return {name: t for name, t in held.items() if any(words in name for words in kept)}


@pytest.fixture
def base(request, tmp_path) -> Path:
    return save_base(request.param, tmp_path / request.param)  # in float32: bfloat16 has not all its values


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_routers_and_biases_are_float32_while_training_and_in_the_export(base, tmp_path, stage):
    before, held = load_file(base / "model.safetensors"), trained(recipe_of(base, stage), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    biases = [name for name in after if BIAS in name or "moe_statics" in name]
    assert biases and held
    for name, tensor in after.items():
        is_router = FAMILIES[base.name] is not None and name.endswith(FAMILIES[base.name])
        if name not in biases and not is_router:
            assert tensor.dtype == torch.bfloat16, name
            continue
        assert tensor.dtype == torch.float32, name
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} would lose digits in bfloat16"
        assert torch.equal(tensor, before[name]) != is_router, name
    for name, tensor in held.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, after[name]) if name in after else "moe_statics" in name, name


@pytest.mark.parametrize("base", ["glm4_moe"], indirect=True)
def test_zero_3_keeps_biases_and_refuses_routers(base, tmp_path):
    before = load_file(base / "model.safetensors")
    trained(recipe_of(base, 3), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    biases = [name for name in after if BIAS in name]
    assert biases and all(torch.equal(after[name], before[name]) for name in biases)


@pytest.mark.parametrize("base", ["beam"], indirect=True)
def test_routers_in_float32_are_refused_at_zero_3(base, tmp_path):
    with pytest.raises(UserInputError, match=r"(?s)keeps weights in float32.*mlp.gate.weight.*zero2"):
        trained(recipe_of(base, 3), tmp_path / "out")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_adapters_leave_routers_in_float32_and_merges_too(base, tmp_path, stage):
    adapter = {"kind": "lora", "r": 4, "targets": ["q_proj", "v_proj"]}
    recipe = recipe_of(base, stage, adapter=adapter)
    held = trained(recipe, tmp_path / "adapter")
    assert held and all(tensor.dtype == torch.float32 for tensor in held.values())
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", recipe.model, quantised=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    kept = [name for name, tensor in after.items() if tensor.dtype == torch.float32]
    assert len(kept) >= len([name for name in after if BIAS in name or "moe_statics" in name]) > 0
    assert all(torch.equal(after[name], before[name]) for name in kept)


def test_the_families_are_what_they_stand_for():
    assert config_of("beam").num_experts > 1 and config_of("glm4_moe").n_routed_experts > 1


@pytest.mark.slow
@pytest.mark.parametrize("base", ["beam"], indirect=True)
def test_two_ranks_train_routers_in_float32_as_one_does(tiny_recipe, base):
    model = {"model": {"path": str(base), "dtype": "bfloat16"}, "train": {"lr": 1e-3}}
    names = {f"{kind}{stage}": f"zero{stage}" for stage in (0, 1, 2) for kind in ("one", "two")}
    paths = {n: write_recipe(tiny_recipe, n, **model, deepspeed=stage) for n, stage in names.items()}
    run_cells([path for name, path in paths.items() if name.startswith("one")], ranks=1)
    run_cells([path for name, path in paths.items() if name.startswith("two")], ranks=2)
    for stage in (0, 1, 2):
        one, two = steps(f"one{stage}"), steps(f"two{stage}")
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-2)
        routers = [t for n, t in weights(f"two{stage}").items() if n.endswith("mlp.gate.weight")]
        assert routers and all(tensor.dtype == torch.float32 for tensor in routers)
