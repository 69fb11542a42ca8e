"""Adapters: low-rank updates beside frozen weights (LoRA, arXiv 2106.09685), through peft.

In: a causal LM and the recipe's adapter section. Out: the same model with trainable A and B beside its
layers; a peft folder that plain transformers and peft load.
Invariant: adapter weights are drawn from the recipe's seed alone, on every rank alike, and B starts at 0:
the model's first outputs are the base model's.
Trade-off: layers are replaced inside the model (not wrapped around it), so training, ZeRO and decoding see
the class they know; the price is peft's "base_model.model." prefix, added here when a folder is written.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from sftcore.config import AdapterSettings
from sftcore.errors import Problem, TrainingFailed, UserInputError
from sftcore.model.identity import ADAPTER_CONFIG
from sftcore.model.vocabulary import vocabulary_modules, vocabulary_weights

PREFIX = "base_model.model."
COMPARED = {  # keys of adapter_config.json that have to agree -> what the recipe calls them
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
CLASSIFIER = "score"  # the classifier's name in all of transformers' decoders
CLASSIFIES = "SEQ_CLS"  # peft's word for it
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, settings: AdapterSettings, *, seed: int) -> None:
    """Freeze the model and put a trainable adapter beside its target layers, in place.

    Raises:
        UserInputError: a target names no linear layer, or the output layer.
    """
    from peft import LoraConfig  # 3 s, and it loads bitsandbytes: only adapter runs pay

    _check_targets(model, settings)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type=CLASSIFIES if is_classifier(model) else "CAUSAL_LM",
        bias="none",
    )
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


def train_whole_layers(model: PreTrainedModel, *, vocabulary: bool) -> None:
    """Train a classifier's new layer whole beside the adapter, and save it with that.

    Args:
        vocabulary: the embedding and the output layer of a causal LM, too: tokens were added.
    """
    layers = [CLASSIFIER] if is_classifier(model) else []
    weights = [parameter for layer in layers for parameter in model.get_submodule(layer).parameters()]
    if vocabulary:
        layers += vocabulary_modules(model)
        weights += vocabulary_weights(model).values()
    for parameter in weights:
        parameter.requires_grad_(True)
    config: Any = model.peft_config["default"]
    config.modules_to_save = layers or None


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model ends in a classifier instead of a vocabulary."""
    return model.get_output_embeddings() is None


def continue_adapter(model: PreTrainedModel, folder: Path, settings: AdapterSettings) -> None:
    """Overwrite the fresh adapter of `model` (see `add_adapter`) with a saved one, in place.

    Raises:
        UserInputError: it was trained with other settings, or for another model.
    """
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config: Any = model.peft_config["default"]
    ours = config.to_dict()
    differing = [key for key in COMPARED if _plain(saved.get(key)) != _plain(ours[key])]
    if differing:
        raise UserInputError(
            *(
                Problem(
                    what=f"the adapter to go on from has another {name}",
                    where=str(folder),
                    got=str(_plain(saved.get(key))),
                    allowed=str(_plain(ours[key])),
                    remedy=f"set adapter.{name} as it was trained",
                )
                for key in differing
                for name in (COMPARED[key],)
            )
        )
    _fill_adapter(model, folder)


def _plain(value: Any) -> Any:
    """A peft setting as it can be compared: sets and lists alike."""
    return sorted(value) if isinstance(value, set | list | tuple) else value


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put a saved adapter beside the layers of its base model, in place.

    Through peft: transformers 5.23's own `load_adapter` drops DoRA's magnitudes with a warning.

    Raises:
        UserInputError: the folder's weights are not those that its configuration asks for.
    """
    from peft import PeftConfig, inject_adapter_in_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.modules_to_save = None  # layers trained whole overwrite the model's own, ties and all
    inject_adapter_in_model(config, model)
    _fill_adapter(model, folder)


def _fill_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load a folder's weights into the adapter that `model` has.

    Raises:
        UserInputError: they are not those that the adapter asks for.
    """
    from peft import set_peft_model_state_dict

    weights = {
        name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    whole = {name: weights.pop(name) for name in list(weights) if not is_update(name)}
    _overwrite(model, whole, folder)
    result: Any = set_peft_model_state_dict(model, weights)
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if wrong:
        raise UserInputError(
            Problem(what="the adapter does not fit its base", where=str(folder), got=", ".join(wrong[:3]))
        )


def is_update(name: str) -> bool:
    """Whether a weight of an adapter's file is a low-rank update, rather than a layer trained whole."""
    return ".lora_" in name


def _overwrite(model: PreTrainedModel, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy layers that were trained whole over the model's own.

    Raises:
        UserInputError: the model has no such layer, or one of another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in whole.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserInputError(
                Problem(
                    what="the adapter does not fit its base",
                    where=str(folder),
                    got=f"{name} {tuple(tensor.shape)}",
                    remedy="set model.add_tokens as it was trained",
                )
            )
        with torch.no_grad():
            own[name].copy_(tensor)


def _check_targets(model: PreTrainedModel, settings: AdapterSettings) -> None:
    if settings.targets == "all-linear":
        return
    head = model.get_submodule(CLASSIFIER) if is_classifier(model) else model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    wrong = [target for target in settings.targets if target not in names]
    if wrong:
        raise UserInputError(
            Problem(
                what="no linear layer of this model has that name (the output layer can't have an adapter)",
                where="adapter.targets",
                got=", ".join(wrong),
                allowed=f"all-linear, or a list of: {', '.join(sorted(names))}",
            )
        )


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_adapter(model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors.

    Args:
        weights: the trained parameters by their names in `model`, whole (not sharded).

    Raises:
        TrainingFailed: a weight is empty or absent; ZeRO-3 leaves such husks where nothing was gathered.
    """
    from peft import get_peft_model_state_dict

    updates = {name: tensor for name, tensor in weights.items() if is_update(name)}
    whole = {name: tensor for name, tensor in weights.items() if not is_update(name)}
    named = get_peft_model_state_dict(model, state_dict=updates) | whole
    check_complete(named, wanted=len(trained_names(model)))
    if (
        whole and model.config.tie_word_embeddings and not is_classifier(model)
    ):  # peft keeps a copy of each: both have to be in the file
        (tied,) = whole.values()
        named |= {f"{module}.weight": tied.clone() for module in vocabulary_modules(model)}
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in named.items()}, folder / ADAPTER_WEIGHTS
    )


def check_complete(weights: dict[str, torch.Tensor], *, wanted: int) -> None:
    """Refuse an adapter with missing or empty weights.

    Raises:
        TrainingFailed: fewer than `wanted` weights, or one without elements.
    """
    empty = sorted(name for name, tensor in weights.items() if not tensor.numel())
    if empty or len(weights) != wanted:
        raise TrainingFailed(
            f"the adapter to be saved has {len(weights)} of {wanted} weights, {len(empty)} of them empty"
            + (f" (such as {empty[0]})" if empty else "")
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def merge_weight(weight: torch.Tensor, parts: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """W + s B A, or DoRA's m (W + s B A) / ||W + s B A|| by rows (arXiv 2402.09353); float32 inside.

    s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

    Args:
        weight: (out, in) of the base layer.
        parts: lora_A (r, in), lora_B (out, r) and, for DoRA, lora_magnitude_vector (out,).
        config: adapter_config.json as a dictionary.
    """
    r = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
    merged = weight.float() + scale * (parts["lora_B"].float() @ parts["lora_A"].float())
    if config["use_dora"]:
        merged = merged * (parts["lora_magnitude_vector"].float() / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)
