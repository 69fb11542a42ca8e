"""Adapters: low-rank updates next to frozen weights (LoRA, arXiv 2106.09685), through peft.

In: a causal LM and the recipe's adapter section. Out: the same model with trainable A and B next to its
layers; a peft folder that plain transformers and peft load.
Invariant: adapter weights are drawn from the recipe's seed alone, on every rank alike, and B starts at 0:
the model's first outputs are the base model's.
Trade-off: layers are replaced inside the model (not wrapped around it), so training, ZeRO and decoding see
the class they know; the price is peft's "base_model.model." prefix, added here when a folder is written.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcore.config import AdapterSettings
from sftcore.errors import Problem, TrainingFailed, UserInputError
from sftcore.model.adapter_files import (
    ADAPTER_WEIGHTS,
    PREFIX,
    adapter_to_continue,
    is_update,
    read_adapter,
    vocabulary_trained,
    whole_layers,
)
from sftcore.model.identity import ADAPTER_CONFIG
from sftcore.model.reach import unreached_layers
from sftcore.model.vocabulary import vocabulary_modules
from sftcore.model.weight_files import check_weight_files

log = logging.getLogger(__name__)
CLASSIFIER = "score"  # the classifier's name in all of transformers' decoders
CLASSIFIES = "SEQ_CLS"  # peft's word for it


def add_adapter(
    model: PreTrainedModel, settings: AdapterSettings, *, seed: int, saved: Path | None = None
) -> None:
    """Freeze the model and put a trainable adapter next to its target layers, in place.

    Args:
        saved: a peft folder to go on from: its configuration holds, with ranks and scales of single layers.

    Raises:
        UserInputError: a target names no linear layer, or the output layer; peft can't adapt such layers so,
            or would not find them again; or the saved adapter was trained with other settings.
    """
    _check_targets(model, settings)
    torch.manual_seed(seed)
    config = _fresh_config(model, settings) if saved is None else _to_continue(saved, settings)
    config.task_type = CLASSIFIES if is_classifier(model) else "CAUSAL_LM"
    try:
        model.add_adapter(config)
    except ValueError as error:
        what = f"an adapter can't be put into model type {model.config.model_type!r}: {error}"
        remedy = (
            "set adapter.dropout: 0 and dora: false, or list in adapter.targets layers outside of the experts"
        )
        raise UserInputError(Problem(what=what, where="adapter", remedy=remedy)) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    _check_names(model)


def _to_continue(saved: Path, settings: AdapterSettings) -> Any:
    config = adapter_to_continue(saved, settings)
    config.modules_to_save = None  # named by train_whole_layers; the file's overwrite the model's own
    if settings.targets == "all-linear":
        found = config.target_modules
        names = found if isinstance(found, str) else ", ".join(sorted(found))
        log.info("adapter.targets: those of %s go on, none are added: %s", saved, names)
    return config


def _fresh_config(model: PreTrainedModel, settings: AdapterSettings) -> Any:
    from peft import LoraConfig  # 3 s, and it loads bitsandbytes: only adapter runs pay

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        exclude_modules=[*_odd_layers(model), *unreached_layers(model)] or None,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        bias="none",
    )


def _odd_layers(model: PreTrainedModel) -> list[str]:
    """Linear layers that compute something else, as some routers: nothing can be added to their product."""
    return [name for name, module in model.named_modules() if _is_odd(module)]


def _is_odd(module: nn.Module) -> bool:
    kind = type(module)
    return (
        isinstance(module, nn.Linear)
        and kind.forward is not nn.Linear.forward
        and kind.__name__ not in ("Linear4bit", "TrainedTokenHead")
    )


def _check_names(model: PreTrainedModel) -> None:
    """Refuse an adapter that peft would not load again: it renames weights of files by patterns.

    Raises:
        UserInputError: with the layers.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    updates = {name: p.data for name, p in model.named_parameters() if is_update(name)}
    if not all(tensor.numel() for tensor in updates.values()):
        return  # cut up over the ranks
    saved = get_peft_model_state_dict(model, state_dict=updates)
    result: Any = set_peft_model_state_dict(model, saved)
    lost = sorted({name.partition(".lora_")[0] for name in result.missing_keys if is_update(name)})
    if lost:
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in lost}))
        raise UserInputError(
            Problem(
                what=f"peft would not find the adapter of these layers of model type "
                f"{model.config.model_type!r} again: it renames them while loading",
                where="adapter.targets",
                got=", ".join(lost[:3]),
                remedy=f"list others than {layers} in adapter.targets",
            )
        )


def train_whole_layers(model: PreTrainedModel, *, vocabulary: bool, saved: Path | None = None) -> None:
    """Train a classifier's new layer whole next to the adapter, and save it with that.

    Args:
        vocabulary: the embedding and the output layer of a causal LM, too: tokens were added.
        saved: an adapter to go on from; which of these two it has trained is trained on.
    """
    layers = [CLASSIFIER] if is_classifier(model) else []
    carried = vocabulary_trained(saved) if saved is not None else set()
    both = vocabulary_modules(model)
    if vocabulary or (is_tied(model) and carried.intersection(both)):
        layers += both
    else:
        layers += [name for name in both if name in carried]
    for layer in layers:
        for parameter in model.get_submodule(layer).parameters():
            parameter.requires_grad_(True)
    config: Any = model.peft_config["default"]
    config.modules_to_save = layers or None


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the embedding is the output layer, too."""
    return bool(model.config.tie_word_embeddings) and not is_classifier(model)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model ends in a classifier instead of a vocabulary."""
    return model.get_output_embeddings() is None


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put a saved adapter next to the layers of its base model, in place.

    Through peft: transformers 5.23's own `load_adapter` drops DoRA's magnitudes with a warning.

    Raises:
        UserInputError: the folder's weights are not those that its configuration asks for.
    """
    from peft import inject_adapter_in_model

    check_weight_files(folder)
    config = read_adapter(folder)
    config.inference_mode = True
    config.modules_to_save = None  # layers trained whole overwrite the model's own, ties and all
    inject_adapter_in_model(config, model)
    fill_adapter(model, folder)


def fill_adapter(model: PreTrainedModel, folder: Path, *, is_trained: bool = False) -> None:
    """Load a folder's weights into the adapter that `model` has.

    Args:
        is_trained: layers of it that were trained whole have to be trained on: nothing else is exported.

    Raises:
        UserInputError: they are not those that the adapter asks for.
    """
    from peft import set_peft_model_state_dict

    weights = {
        name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items()
    }
    whole = {name: weights.pop(name) for name in list(weights) if not is_update(name)}
    if is_trained:
        _check_trained(model, whole, folder)
    _overwrite(model, whole, folder)
    result: Any = set_peft_model_state_dict(model, weights)
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if wrong:
        raise UserInputError(
            Problem(what="the adapter does not fit its base", where=str(folder), got=", ".join(wrong[:3]))
        )


def _check_trained(model: PreTrainedModel, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse layers that were trained whole and won't be here; the base's own (peft adds some) do no harm."""
    own = dict(model.named_parameters(remove_duplicate=False))
    if is_tied(model):
        _check_tied(model, whole, folder)
    trained = {id(own[name]) for name in trained_names(model)}
    lost = [
        name
        for name, tensor in whole.items()
        if name in own
        and id(own[name]) not in trained
        and own[name].shape == tensor.shape
        and not torch.equal(own[name].cpu(), tensor.to(own[name].dtype))
    ]
    if lost:
        raise UserInputError(whole_layers(lost, folder))


def _check_tied(model: PreTrainedModel, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse an embedding trained apart from the output layer, where the model has one weight for both."""
    names = [f"{module}.weight" for module in vocabulary_modules(model)]
    found = [whole[name] for name in names if name in whole]
    is_apart = len(found) == 1 or any(not torch.equal(found[0], other) for other in found[1:])
    if is_apart and vocabulary_trained(folder):
        raise UserInputError(
            Problem(
                what="this adapter has trained embedding and output layer apart, which its base has tied",
                where=str(folder / ADAPTER_WEIGHTS),
                got=", ".join(name for name in names if name in whole),
                remedy="merge it into an untied copy of its base, and train a fresh adapter on that",
            )
        )


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
        if isinstance(module, nn.Linear | Conv1D) and module is not head
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


def write_adapter(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors; returns what is in the latter.

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
    if whole and is_tied(model):  # peft keeps a copy of each: both have to be in the file
        (tied,) = (tensor for name, tensor in whole.items() if name.endswith(".weight"))
        named |= {f"{module}.weight": tied.clone() for module in vocabulary_modules(model)}
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    written = {PREFIX + name: tensor.contiguous() for name, tensor in named.items()}
    save_file(written, folder / ADAPTER_WEIGHTS)
    return written


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


def merge_weight(
    weight: torch.Tensor, parts: dict[str, torch.Tensor], config: Any, *, name: str
) -> torch.Tensor:
    """W + s B A, or DoRA's m (W + s B A) / ||W + s B A|| by rows (arXiv 2402.09353); float32 inside.

    s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

    Args:
        weight: (out, in) of the base layer.
        parts: lora_A (r, in), lora_B (out, r) and, for DoRA, lora_magnitude_vector (out,).
        config: adapter_config.json as a dictionary.
        name: the layer's, by which patterns give it an alpha of its own.
    """
    from peft.utils.other import get_pattern_key

    r = len(parts["lora_A"])
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    merged = weight.float() + scale * (parts["lora_B"].float() @ parts["lora_A"].float())
    if config.get("use_dora"):
        merged = merged * (parts["lora_magnitude_vector"].float() / merged.norm(dim=1))[:, None]
    return merged.to(weight.dtype)
