"""What transformers keeps in float32 stays so in a bfloat16 model: while it trains, in exports and merges."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import config_of, save_family
from launching import run_cells, steps, weights, write_recipe
from safetensors.torch import load_file
from tiny import tiny_tokenizer

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.model.kept import kept_parameters, persistent_buffers
from sftcore.model.load import load_for_training
from sftcore.model.merge import merge_adapter
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import complete_ds_config, read_ds_config
from sftcore.train.engine import Engine, init_process_group
from sftcore.train.export import export_weights

FAMILIES = {"beam": "mlp.gate.weight", "ernie4_5_moe": "mlp.gate.weight", "glm4_moe": None}
BIAS = "e_score_correction_bias"


def recipe_for(folder: Path, stage: int, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "bfloat16"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3, "capacity": 64},
            "deepspeed": f"zero{stage}",
        }
        | changes
    )


def pack_of(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    documents = [SimpleNamespace(input_ids=rng.integers(3, 290, n).astype(np.int32)) for n in (12, 20)]
    for document in documents:
        document.labels = np.append(document.input_ids[1:], UNTRAINED).astype(np.int32)
    return collate(documents, normalise="token", num_trained_in_step=30, num_samples_in_step=2)


def trained(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """Three steps, exported: what was in memory of parameters and buffers that are kept in float32."""
    init_process_group()
    config = read_ds_config(deepspeed_file(recipe))
    sharded = complete_ds_config(config, recipe) if recipe.deepspeed == "zero3" else None
    engine = Engine(load_for_training(recipe, sharded_by=sharded), recipe, config)
    losses = [engine.step([pack_of(0)], seeds=[0], lr=1e-3).loss for _ in range(3)]
    assert losses[2] < losses[0]
    export_weights(engine, tiny_tokenizer(), recipe, folder=folder)
    model = engine.loss_model.causal_lm
    held = kept_parameters(model) | {n: b for n, b in persistent_buffers(model).items() if BIAS in n}
    held = {name: tensor.detach().clone() for name, tensor in held.items()}
    engine.close()
    return held


@pytest.fixture
def base(request, tmp_path) -> Path:
    folder = tmp_path / request.param
    save_family(request.param, folder)  # in float32, so that biases have values that bfloat16 has not
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_routers_and_biases_are_float32_while_training_and_in_the_export(base, tmp_path, stage):
    before, held = load_file(base / "model.safetensors"), trained(recipe_for(base, stage), tmp_path / "out")
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
    trained(recipe_for(base, 3), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    biases = [name for name in after if BIAS in name]
    assert biases and all(torch.equal(after[name], before[name]) for name in biases)


@pytest.mark.parametrize("base", ["beam"], indirect=True)
def test_routers_in_float32_are_refused_at_zero_3(base, tmp_path):
    with pytest.raises(UserInputError, match=r"(?s)keeps weights in float32.*mlp.gate.weight.*zero2"):
        trained(recipe_for(base, 3), tmp_path / "out")


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_adapters_leave_routers_in_float32_and_merges_too(base, tmp_path, stage):
    adapter = {"kind": "lora", "r": 4, "targets": ["q_proj", "v_proj"]}
    recipe = recipe_for(base, stage, adapter=adapter)
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
