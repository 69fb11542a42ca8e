"""What is exported of each architecture that trains: reloaded it is what was trained, merged it is peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import TRAINED
from miniature_runs import exported, recipe_for, save_base, take_steps
from transformers import AutoModelForCausalLM

from sftcore.errors import UserInputError
from sftcore.model.merge import merge_adapter
from sftcore.objectives import load_objective
from sftcore.train.engine import Engine

IDS = torch.arange(3, 60)[None]
# routers' biases and layers' scalars; fused experts; transposed and nested weights; biased heads
QUICK = ("deepseek_v3", "gemma4_text", "gpt2", "gemma3", "mixtral", "phi", "llama")
RENAMED = ("laguna",)  # by a pattern that fits the renamed weights once more


@pytest.fixture
def base(tmp_path, request) -> Path:
    if request.param in RENAMED:
        (tmp_path / "refused").touch()
    return save_base(request.param, tmp_path / "base")


def by_speed(names: tuple[str, ...]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def change_everything(engine: Engine) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in engine.objective.causal_lm.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))


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
            load_objective(recipe)
        return
    exported(recipe, tmp_path / "adapter", take_steps)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", recipe.model, quantised=False)
    before = logits(own(base))
    theirs = logits(PeftModel.from_pretrained(own(base), str(tmp_path / "adapter")))
    merged = logits(own(tmp_path / "merged"))
    assert (theirs - before).abs().max() > 1e-3 * before.abs().max(), "the adapter does something"
    assert torch.allclose(merged, theirs, atol=1e-4 * float(theirs.abs().max()))


# a buffer of routers, with float32 products; fused experts; weights kept in float32
@pytest.mark.parametrize("stage", ["zero0", "zero1"])
@pytest.mark.parametrize("base", ["deepseek_v3", "mixtral", "beam"], indirect=True)
def test_what_is_reloaded_in_bfloat16_is_what_was_trained(base, tmp_path, stage):
    recipe = recipe_for(base, model={"path": str(base), "dtype": "bfloat16"}, deepspeed=stage)
    held = exported(recipe, tmp_path / "out", take_steps)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    assert again.keys() == held.keys()
    changed = 0
    for name, tensor in held.items():
        assert again[name].dtype == before[name].dtype, name
        assert torch.equal(tensor.to(again[name].dtype), again[name]), name
        changed += not torch.equal(again[name], before[name])
    assert changed > len(held) // 2, "it was trained"
