"""What layers share, and weights used outside of their module: whole gradients at ZeRO-3, recomputed too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import RATE, collated, documents, recipe_for, save_family
from transformers import AutoModelForCausalLM

from sftcore.batching.collate import UNTRAINED
from sftcore.recipe import DS_CONFIGS, deepspeed_file
from sftcore.stages.train import _make_engine
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import init_process_group

E2B = {"num_kv_shared_layers": 20, "num_hidden_layers": 35, "layer_types": None}
FAMILIES = {  # layers share keys and values, weights are used by another module, layers run several times
    "gemma4_text": E2B,
    "gemma3n_text": {},
    "longcat_flash": {},
    "hrm_text": {},
}


def own_norm(folder: Path) -> tuple[float, float]:
    """Loss and gradient norm of the documents alone, by transformers and torch."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    total = torch.zeros(())
    for document in documents(0):
        ids = torch.from_numpy(document.input_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        labels = torch.from_numpy(document.labels).long()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNTRAINED, reduction="sum")
        total = total + loss
    trained = sum(int((document.labels != UNTRAINED).sum()) for document in documents(0))
    (total / trained).backward()
    return float(total / trained), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))


@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_whole_at_stage_3(tmp_path, monkeypatch, family, recomputed):
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)  # at stage 3 DeepSpeed puts its own there
    save_family(family, tmp_path, **FAMILIES[family])
    ds_config = read_ds_config(DS_CONFIGS / "zero3.json")
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights are cut up, too
    (tmp_path / "zero3.json").write_text(json.dumps(ds_config))
    train = {"lr": RATE, "max_grad_norm": 0.0, "activation_checkpointing": recomputed}
    recipe = recipe_for(tmp_path, deepspeed=str(tmp_path / "zero3.json"), train=train)
    loss, norm = own_norm(tmp_path)
    init_process_group()
    engine = _make_engine(recipe, read_ds_config(deepspeed_file(recipe)))
    result = engine.step([collated(documents(0))], seeds=[0], rates={"lr": RATE})
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3)
    engine.close()
