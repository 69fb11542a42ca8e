"""The properties of training, on a tiny model of every causal architecture that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    LENGTHS,
    RATE,
    TRAINED,
    collated,
    config_of,
    documents,
    model_of,
    recipe_for,
    save_family,
)
from transformers import AutoModelForCausalLM

from sftcore.batching.collate import UNTRAINED
from sftcore.config import Recipe
from sftcore.model.miniature import BEYOND
from sftcore.objectives import load_objective
from sftcore.objectives.next_token import NextToken
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import Engine, init_process_group

STEPS = 2


def own_loss(model: Any, chosen: list[Any]) -> torch.Tensor:
    """By transformers' own model and attention, each document alone."""
    losses = []
    for document in chosen:
        ids = torch.from_numpy(document.input_ids).long()[None]
        positions = torch.arange(ids.shape[1])[None]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        labels = torch.from_numpy(document.labels).long()
        losses.append(
            torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNTRAINED, reduction="sum")
        )
    return torch.stack(losses).sum() / sum(n - 2 for n in LENGTHS)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """All tensors, within a share of the largest value of any."""
    assert wanted
    for name, tensor in wanted.items():
        if tensor.abs().max() > 0 or name in found:
            scale = max(float(tensor.abs().max()), 1e-4)
            assert float((found[name] - tensor).abs().max()) <= tolerance * scale, name


def own_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).train()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_packs_and_steps_are_those_of_documents_alone_in_plain_torch(tmp_path, name):
    save_family(name, tmp_path)
    recipe = recipe_for(tmp_path)
    ours = load_objective(recipe)
    own = own_model(tmp_path)
    check_a_pack(ours, own)
    check_steps(ours, own, recipe)


def check_a_pack(ours: NextToken, own: Any) -> None:
    ours.train()
    packed, _ = ours(collated(documents(0)))
    alone = own_loss(own, documents(0))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    packed.backward()
    alone.backward()
    check_equal(gradients(ours.causal_lm), gradients(own), 1e-3)
    ours.zero_grad()
    own.zero_grad()


def check_steps(ours: NextToken, own: Any, recipe: Recipe) -> None:
    decayed = [p for p in own.parameters() if p.requires_grad]
    update = torch.optim.AdamW(decayed, lr=RATE, betas=recipe.train.betas, eps=1e-3, weight_decay=0.0)
    init_process_group()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"eps": 1e-3})})
    engine = Engine(ours, recipe, read_ds_config(deepspeed_file(recipe)))
    for number in range(STEPS):
        loss = own_loss(own, documents(number))
        result = engine.step([collated(documents(number))], seeds=[number], rates={"lr": RATE})
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        update.zero_grad()
        loss.backward()
        update.step()
    trained = {name: p.detach() for name, p in ours.causal_lm.named_parameters()}
    check_equal(trained, {name: p.detach() for name, p in own.named_parameters()}, 1e-3)
    engine.close()


def test_most_architectures_train_and_miniatures_are_small():
    assert len(TRAINED) >= 80
    assert config_of("mistral").sliding_window < BEYOND
    assert sum(p.numel() for p in model_of("llama").parameters()) < 200_000
