"""Whether a base model's weights are quantised already (GPTQ, AWQ, bitsandbytes, FP8, MXFP4 ...).

In: a recipe and its model's configuration. Out: a `Problem`, or nothing.
Invariant: a model whose matrices have no gradient is refused before anything is tokenised or loaded; training
would only move what is left in 16 bits, embeddings and norms, and its export would be neither form.
Trade-off: the configuration is asked first, then the headers of the folder's safetensors files (1 ms a file):
older tools write quantised weights without a word in config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.errors import Problem
from sftcore.model.weight_files import read_header

KEYS = ("quantization_config", "compression_config")
FILES = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and AutoAWQ
FEW_BITS = ("U8", "I8", "U4", "I4", "F4", "F4_E2M1")
NAMES = ("qweight", "weight_packed", "weight_quantized", "qzeros")


def already_quantised(recipe: Recipe, config: Any) -> Problem | None:
    """The refusal of a base that is quantised, or None."""
    how = _configured(config.to_dict()) or _stored(Path(recipe.model.path))
    if how is None:
        return None
    return Problem(
        what=f"the weights of this model are quantised already ({how}) and can't be trained",
        where=f"model.path {recipe.model.path}",
        remedy="give the model that it was made of, in 16 bits (its name without -GPTQ, -AWQ, -FP8, -4bit); "
        "adapter.kind: qlora holds that one in 4 bits while it trains",
    )


def _configured(values: dict[str, Any]) -> str | None:
    """The method that a configuration, or one inside it, names."""
    for key in KEYS:
        if settings := values.get(key):
            return str(settings.get("quant_method") or settings.get("quantization_method") or key)
    inner = (_configured(value) for value in values.values() if isinstance(value, dict))
    return next((how for how in inner if how), None)


def _stored(folder: Path) -> str | None:
    """What in a model's folder says that its weights have few bits."""
    if not folder.is_dir():
        return None
    if found := [name for name in FILES if (folder / name).is_file()]:
        return found[0]
    for file in sorted(folder.glob("*.safetensors")):
        for name, dtype in _tensors_of(file):
            last = name.rpartition(".")[2]
            if last in NAMES or dtype.startswith("F8") or (dtype in FEW_BITS and last == "weight"):
                return f"{name} in {file.name} is {dtype}"
    return None


def _tensors_of(file: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor, from the file's header; nothing where that can't be read."""
    try:
        entries, _ = read_header(file)
    except (OSError, ValueError):
        return  # loading says what is wrong with it
    for name, entry in entries.items():
        if isinstance(entry.get("dtype"), str):
            yield name, entry["dtype"]
