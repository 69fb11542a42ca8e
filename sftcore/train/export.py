"""Export: trained weights -> a Hugging Face folder that transformers loads.

In: an engine, a tokenizer. Out: RUN/model with safetensors, configuration, tokenizer, generation
configuration.
Invariant: the folder appears whole, by rename, after everything in it was written and flushed.
Trade-off: rank 0 holds one full copy of the weights in CPU memory (2 bytes per parameter) while it writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftcore import dist
from sftcore.fsio import atomic_folder
from sftcore.train.engine import Engine


def export_model(engine: Engine, tokenizer: Any, folder: Path, *, name_or_path: str) -> None:
    """Write the trained model; all ranks must call it.

    Raises:
        MissingEnvironmentError: the disk is full; nothing is left under `folder`.
    """
    weights = engine.gather_weights()
    if dist.rank() == 0:
        model = engine.loss_model.causal_lm
        model.config.use_cache = True
        model.config.dtype = engine.save_dtype
        model.config._attn_implementation = "sdpa"
        model.config._name_or_path = name_or_path
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
    dist.barrier()
