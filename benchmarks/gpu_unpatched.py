"""What liger, TRL and ZeRO-3 change in other modules for the whole process, put back after use.

liger's instance patch also sets functions and classes of the model's module (`apply_rotary_pos_emb`, say), so
that everything built later in the same process would run with its kernels, the baseline and our own too.
DeepSpeed's stage 3 sets `torch.nn.functional.linear`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from transformers import AutoModelForCausalLM

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def patched_modules(config: Any) -> list[ModuleType]:
    """Where such patches go for a model of this configuration."""
    model = AutoModelForCausalLM._model_mapping[type(config)]
    names = (model.__module__, "torch.nn.functional", "transformers.loss.loss_utils")
    return [sys.modules.get(name) or importlib.import_module(name) for name in names]


@contextmanager
def restored(modules: list[ModuleType]) -> Iterator[None]:
    """Give the modules, and the classes that they define, their names of before the block."""
    owners: list[Any] = [*modules]
    for module in modules:
        owners += [
            c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
        ]
    before = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, names in before:
            for name, value in dict(vars(owner)).items():
                if name not in names and not name.startswith("__"):
                    delattr(owner, name)
                elif name in names and value is not names[name]:
                    setattr(owner, name, names[name])


@contextmanager
def without_ranks() -> Iterator[None]:
    """Hide what makes this process a rank to DeepSpeed: accelerate would wrap the model in DDP for it."""
    kept = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
