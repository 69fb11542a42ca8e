"""Runs of a few steps on a tiny model of any architecture, in this process, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from families import save_family
from tiny import tiny_tokenizer

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.data.tokens import load_tokenizer
from sftcore.objectives import load_objective
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import complete_ds_config, read_ds_config
from sftcore.train.engine import Engine, init_process_group
from sftcore.train.export import export_weights


def save_base(name: str, folder: Path) -> Path:
    """A model of a family with a tokenizer, as a Hugging Face folder."""
    save_family(name, folder)
    tiny_tokenizer().save_pretrained(folder)
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


def pack_of(seed: int) -> Any:
    """Two random documents."""
    rng = np.random.default_rng(seed)
    documents = [
        SimpleNamespace(input_ids=rng.integers(3, 290, n).astype(np.int32), extra={}) for n in (12, 20)
    ]
    for document in documents:
        document.labels = np.append(document.input_ids[1:], UNTRAINED).astype(np.int32)
    return collate(documents, normalise="token", num_trained_in_step=30, num_samples_in_step=2)


def take_steps(engine: Engine) -> None:
    """Two large ones: at first only B has a gradient, and in layers that no forward reaches it stays 0."""
    for seed in (0, 1):
        engine.step([pack_of(seed)], seeds=[seed], rates={"lr": 3e-2})


def exported(recipe: Recipe, folder: Path, change: Callable[[Engine], None]) -> dict[str, torch.Tensor]:
    """Train as `change` does and export; the weights and buffers that were in memory then."""
    init_process_group()
    config = read_ds_config(deepspeed_file(recipe))
    sharded = complete_ds_config(config, recipe) if recipe.deepspeed == "zero3" else None
    engine = Engine(load_objective(recipe, sharded_by=sharded), recipe, config)
    change(engine)
    tokenizer = load_tokenizer(recipe.model.path, add_tokens=recipe.model.add_tokens)
    export_weights(engine, tokenizer, recipe, folder=folder)
    held = {name: t.detach().clone() for name, t in engine.objective.causal_lm.state_dict().items()}
    engine.close()
    return held
