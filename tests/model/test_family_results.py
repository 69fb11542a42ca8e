"""What is exported of each architecture that trains: reloaded it is what was trained, merged it is peft's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import TRAINED, save_family
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.model.load import load_for_training
from sftcore.model.merge import merge_adapter
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import Engine, init_process_group
from sftcore.train.export import export_weights

IDS = torch.arange(3, 60)[None]
# routers' biases and layers' scalars; fused experts; transposed and nested weights; biased heads
QUICK = ("deepseek_v3", "gemma4_text", "gpt2", "gemma3", "mixtral", "phi", "llama")
RENAMED = ("laguna",)  # by a pattern that fits the renamed weights once more


@pytest.fixture
def base(tmp_path, request) -> Path:
    folder = tmp_path / "base"
    save_family(request.param, folder)
    tiny_tokenizer().save_pretrained(folder)
    if request.param in RENAMED:
        (tmp_path / "refused").touch()
    return folder


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3, "capacity": 64},
            "deepspeed": "zero0",
        }
        | changes
    )


def by_speed(names: tuple[str, ...]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def exported(recipe: Recipe, folder: Path, change: Any) -> dict[str, torch.Tensor]:
    """Train as `change` does and export; the weights and buffers that were in memory then."""
    init_process_group()
    model = load_for_training(recipe)
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    change(engine)
    export_weights(engine, tiny_tokenizer(), recipe, folder=folder)
    held = {name: tensor.clone() for name, tensor in model.causal_lm.state_dict().items()}
    engine.close()
    return held


def change_everything(engine: Engine) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in engine.loss_model.causal_lm.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))


def take_steps(engine: Engine) -> None:
    """Two large ones: at first only B has a gradient, and in layers that no forward reaches it stays 0."""
    for seed in (0, 1):
        engine.step([pack_of(seed)], seeds=[seed], lr=3e-2)


def pack_of(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    documents = [SimpleNamespace(input_ids=rng.integers(3, 290, n).astype(np.int32)) for n in (12, 20)]
    for document in documents:
        document.labels = np.append(document.input_ids[1:], UNTRAINED).astype(np.int32)
    return collate(documents, normalise="token", num_trained_in_step=30, num_samples_in_step=2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def own(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("base", by_speed(TRAINED), indirect=True)
def test_what_is_reloaded_is_what_was_trained(base, tmp_path):
    held = exported(recipe_for(base), tmp_path / "out", change_everything)
    again = own(tmp_path / "out").state_dict()
    assert again.keys() == held.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("base", by_speed(TRAINED), indirect=True)
def test_a_merged_adapter_is_what_peft_makes_of_base_and_adapter(base, tmp_path):
    from peft import PeftModel

    recipe = recipe_for(base, adapter={"kind": "lora", "r": 4})
    if base.with_name("refused").exists():
        with pytest.raises(UserInputError, match="peft would not find the adapter of these layers"):
            load_for_training(recipe)
        return
    exported(recipe, tmp_path / "adapter", take_steps)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", recipe.model, quantised=False)
    before = logits(own(base))
    theirs = logits(PeftModel.from_pretrained(own(base), str(tmp_path / "adapter")))
    merged = logits(own(tmp_path / "merged"))
    assert (theirs - before).abs().max() > 1e-3 * before.abs().max(), "the adapter does something"
    assert torch.allclose(merged, theirs, atol=1e-4 * float(theirs.abs().max()))
