"""Export: trained weights -> a folder that transformers (or peft) loads.

In: an engine, a tokenizer. Out: RUN/model with safetensors, configuration, tokenizer, generation
configuration; of an adapter run RUN/adapter, a peft folder with the tokenizer.
Invariant: the folder appears whole, by rename, after everything in it was written and flushed.
Trade-off: rank 0 holds one full copy of the trained weights in CPU memory (2 bytes per parameter) while it
writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sftcore import dist
from sftcore.config import Recipe
from sftcore.fsio import atomic_folder
from sftcore.model.adapters import write_adapter
from sftcore.train.engine import Engine


def export_weights(engine: Engine, tokenizer: Any, recipe: Recipe) -> None:
    """Write what was trained into the recipe's result folder; all ranks must call it.

    Raises:
        MissingEnvironmentError: the disk is full; nothing is left under that folder.
        TrainingFailed: an adapter's weights are empty or missing.
    """
    weights = engine.gather_weights()
    if dist.rank() == 0:
        with atomic_folder(recipe.result_folder) as temporary:
            if engine.trains_adapter:
                write_adapter(engine.loss_model.causal_lm, weights, temporary)
            else:
                _write_model(engine, weights, temporary, recipe.name)
            tokenizer.save_pretrained(temporary)
    dist.barrier()


def _write_model(engine: Engine, weights: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    model = engine.loss_model.causal_lm
    model.config.use_cache = True
    model.config.dtype = engine.save_dtype
    model.config._attn_implementation = "sdpa"
    model.config._name_or_path = name
    model.save_pretrained(folder, state_dict=weights)
