"""Merging: a base model's files + an adapter -> a whole Hugging Face folder, one shard after another.

In: the base folder, the adapter folder, the dtype that was trained in, whether the base was held in 4 bits.
Out: a folder that plain transformers loads, with the logits of base and adapter together.
Invariant: every adapter weight is used exactly once, else nothing is written.
Trade-off: weights are read and written by name from the safetensors files, without building the model: peak
memory is one shard and one layer in float32 (5 GB for shards of 5 GB, whatever the model's size); a base
without safetensors files is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_folder, read_json, write_json
from sftcore.model.adapters import (
    ADAPTER_WEIGHTS,
    CLASSIFIER,
    CLASSIFIES,
    PREFIX,
    is_update,
    merge_weight,
)
from sftcore.model.identity import ADAPTER_CONFIG
from sftcore.model.quantise import round_trip

INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab*",
    "merges.txt",
    "matching.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is done to each weight of the base.

    Args:
        config: adapter_config.json.
        parts: base weight's name -> {lora_A, lora_B, lora_magnitude_vector} -> tensor.
        whole: name -> a weight that was trained whole and takes the base's place.
        dtype: of the result, and of the base while it was trained.
        quantised: names of the weights that were held in 4 bits.
        used: filled with the names that were merged.
    """

    config: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, torch.Tensor]
    dtype: torch.dtype
    quantised: frozenset[str]
    used: set[str] = field(default_factory=set)

    @property
    def classifies(self) -> bool:
        """Whether a classifier takes the place of the vocabulary."""
        return bool(self.config.get("task_type") == CLASSIFIES)

    @property
    def classifier(self) -> dict[str, torch.Tensor]:
        """The classifier's weights, which no base has; empty for a causal LM."""
        prefix = f"{CLASSIFIER}."
        return {
            name: tensor.to(self.dtype).contiguous()
            for name, tensor in self.whole.items()
            if self.classifies and name.startswith(prefix)
        }

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged form of a base weight."""
        if name in self.whole:
            self.used.add(name)
            return self.whole[name].to(self.dtype).contiguous()
        if weight.is_floating_point():
            weight = weight.to(self.dtype)
        if name in self.quantised:
            weight = round_trip(weight)
        if name in self.parts:
            self.used.add(name)
            weight = merge_weight(weight, self.parts[name], self.config)
        return weight.contiguous()


def merge_adapter(adapter: Path, base: Path, folder: Path, *, dtype: torch.dtype, quantised: bool) -> None:
    """Write base + adapter as a whole model into `folder`.

    Raises:
        UserInputError: the base has no safetensors files, or the adapter names weights that it lacks.
        MissingEnvironmentError: the disk is full; or bitsandbytes is missing for a 4-bit base.
    """
    shards = _shards(base)
    weights = {name.removeprefix(PREFIX): t for name, t in load_file(adapter / ADAPTER_WEIGHTS).items()}
    merge = Merge(
        config=read_json(adapter / ADAPTER_CONFIG),
        parts=_parts(weights),
        whole=_whole(weights, base, shards),
        dtype=dtype,
        quantised=linear_weights(base) if quantised else frozenset(),
    )
    with atomic_folder(folder) as temporary:
        for shard in shards:
            tensors = dict(_merged(shard, merge)) | (merge.classifier if shard == shards[-1] else {})
            save_file(tensors, temporary / shard.name, metadata={"format": "pt"})
        left = sorted((merge.parts.keys() | merge.whole.keys()) - merge.used - merge.classifier.keys())
        if left:
            raise UserInputError(
                Problem(
                    what="the adapter names weights that the base model lacks",
                    where=str(adapter),
                    got=", ".join(left[:3]),
                    remedy=f"is {base} the model that it was trained on?",
                )
            )
        _copy_the_rest(base, adapter, temporary, merge)


def linear_weights(base: Path) -> frozenset[str]:
    """Names of the weights that QLoRA holds in 4 bits: of all linear layers but the output layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )


def _parts(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"model.layers.0.mlp.up_proj.weight": {"lora_A": ..., "lora_B": ...}} from a peft file's weights."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if is_update(name):
            module, _, part = name.removesuffix(".weight").rpartition(".")
            parts.setdefault(f"{module}.weight", {})[part] = tensor
    return parts


def _whole(weights: dict[str, torch.Tensor], base: Path, shards: list[Path]) -> dict[str, torch.Tensor]:
    """Weights that take the base's place; of a tied pair the one that the base's files hold."""
    whole = {name: tensor for name, tensor in weights.items() if not is_update(name)}
    if not AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings:
        return whole
    held: set[str] = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            held.update(tensors.keys())
    tied = {name for name in whole if not name.startswith(f"{CLASSIFIER}.")}
    return {name: tensor for name, tensor in whole.items() if name in held or name not in tied}


def _shards(base: Path) -> list[Path]:
    files = sorted(base.glob("model*.safetensors"))
    if not files:
        remedy = "give a folder with model*.safetensors (sftcore model pull NAME --to DIR)"
        raise UserInputError(Problem(what="no safetensors to merge into", where=str(base), remedy=remedy))
    return files


def _merged(shard: Path, merge: Merge) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(shard, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dictionary
            if not (merge.classifies and name.startswith("lm_head.")):
                yield name, merge.apply(name, tensors.get_tensor(name))


def _copy_the_rest(base: Path, adapter: Path, folder: Path, merge: Merge) -> None:
    """Configurations of the base in the new dtype, the adapter's tokenizer, the index of the shards."""
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(merge.dtype).removeprefix("torch.")
    for name in merge.whole.keys() - merge.classifier.keys():  # the embedding, with rows for added tokens
        config.get("text_config", config)["vocab_size"] = merge.whole[name].shape[0]
    if merge.classifies:
        config |= _classifier_keys(base, adapter)
    write_json(folder / "config.json", config)
    for source in (base, adapter):  # the adapter's knows what ends a turn of its chats
        if (source / GENERATION_CONFIG).is_file():
            shutil.copy(source / GENERATION_CONFIG, folder)
    for pattern in COPIED_FILES:
        for file in adapter.glob(pattern):
            shutil.copy(file, folder)
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors"))
        index["metadata"] = {"total_size": sum(file.stat().st_size for file in files)}
        places = index["weight_map"] | dict.fromkeys(merge.classifier, files[-1].name)
        if merge.classifies:
            places = {name: place for name, place in places.items() if not name.startswith("lm_head.")}
        write_json(folder / INDEX, index | {"weight_map": places})


def _classifier_keys(base: Path, adapter: Path) -> dict[str, Any]:
    """What makes a base's config.json a classifier's; rows are padded with the tokenizer's pad token."""
    config = AutoConfig.from_pretrained(base)
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    words = read_json(adapter / "matching.json")["matching"]["labels"]["en"]
    pad = AutoTokenizer.from_pretrained(adapter).pad_token_id
    return {
        "architectures": [kind.__name__],
        "id2label": {str(number): word for number, word in enumerate(words)},
        "label2id": {word: number for number, word in enumerate(words)},
        "pad_token_id": pad,
    }
