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
from sftcore.fsio import atomic_folder, write_json
from sftcore.model.adapters import write_adapter
from sftcore.train.engine import Engine

MATCHING_FILE = "matching.json"  # beside the weights: which prompts and label words they were trained with


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
                if recipe.classifies:
                    _name_classes(engine, tokenizer, recipe)
                _write_model(engine, weights, temporary, recipe.name)
            tokenizer.save_pretrained(temporary)
            if recipe.task == "matching":
                write_json(temporary / MATCHING_FILE, _what_inference_needs(recipe))
    dist.barrier()


def _what_inference_needs(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide prompts and predictions; paths of data stay behind."""
    return {
        "task": recipe.task,
        "model": {"path": "", "dtype": recipe.model.dtype},
        "adapter": {"kind": recipe.adapter.kind},
        "data": {
            "train": [{"format": "pairs", "path": ""}],
            "template": recipe.model_dump(mode="json")["data"]["template"],
        },
        "batch": {"samples_per_step": 1, "capacity": recipe.max_length},
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "matching": recipe.matching.model_dump(mode="json", exclude={"teacher"}),
    }


def _name_classes(engine: Engine, tokenizer: Any, recipe: Recipe) -> None:
    """Note the classes' names, and a pad token: transformers finds the last real token of a row by it."""
    config = engine.loss_model.causal_lm.config
    config.id2label = dict(enumerate(recipe.matching.labels.en))
    config.label2id = {word: number for number, word in config.id2label.items()}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _write_model(engine: Engine, weights: dict[str, torch.Tensor], folder: Path, name: str) -> None:
    model = engine.loss_model.causal_lm
    model.config.use_cache = True
    model.config.dtype = engine.save_dtype
    model.config._attn_implementation = "sdpa"
    model.config._name_or_path = name
    model.save_pretrained(folder, state_dict=weights)
