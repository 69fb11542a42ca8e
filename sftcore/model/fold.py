"""Folding: an adapter into its base's weights in memory, where names or layouts of files rule `merge` out.

In: the base's model section and an adapter folder. Out: a whole Hugging Face folder, as transformers saves
it; the logits by which a merged folder is judged.
Invariant: each layer is folded by peft's own arithmetic, in float32, and saved in the dtype that it had.
Trade-off: the whole model is held once in the trained dtype (14 GB for 7B parameters), where `merge` needs a
shard; experts, transposed (Conv1D) and renamed weights come out right without a word about any of them here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftcore.config import ModelSettings
from sftcore.errors import Problem, TrainingFailed
from sftcore.fsio import read_json, write_json
from sftcore.model.adapters import attach_adapter
from sftcore.model.load import load_pretrained
from sftcore.model.quantise import quantisation_settings, round_trip
from sftcore.model.sameness import distance, has_room_for, is_same, plain_logits, probe_tokens
from sftcore.model.vocabulary import grow_vocabulary
from sftcore.precision import torch_dtype

log = logging.getLogger(__name__)
Observed = tuple[torch.Tensor, torch.Tensor]  # token ids, and their logits


def load_with_adapter(
    adapter: Path, settings: ModelSettings, kind: Any, *, quantised: bool = False
) -> PreTrainedModel:
    """The base on the host with an adapter next to its layers, in evaluation mode."""
    dtype = torch_dtype(settings)
    options = {"quantization_config": quantisation_settings(dtype)} if quantised else {}
    model = load_pretrained(settings, kind, dtype=dtype, attention="eager", **options)
    grow_vocabulary(model, settings)
    attach_adapter(model, adapter)
    return model.eval()


def logits_with_adapter(
    adapter: Path, settings: ModelSettings, kind: Any, *, quantised: bool, num_bytes: int
) -> Observed | None:
    """What base and adapter give, or None where there is no room for the base."""
    if not has_room_for(num_bytes):
        log.info("the merged model is not compared with base and adapter: no room to load them")
        return None
    model = load_with_adapter(adapter, settings, kind, quantised=quantised)
    ids = probe_tokens(model.config)
    return ids, plain_logits(model, ids)


def check_logits(folder: Path, settings: ModelSettings, kind: Any, wanted: Observed) -> None:
    """Compare a merged folder with base and adapter.

    Args:
        wanted: as `logits_with_adapter` gives it.

    Raises:
        TrainingFailed: it is another model.
    """
    merged = settings.model_copy(update={"path": str(folder), "add_tokens": []})
    model = load_pretrained(merged, kind, dtype=torch_dtype(settings), attention="eager").eval()
    ids, logits = wanted
    share = distance(plain_logits(model, ids), logits, dtype=model.dtype, config=model.config)
    if not is_same(share, model.dtype):
        raise TrainingFailed(
            Problem(
                what="the merged model is not the one that was trained; nothing was written",
                got=f"logits that differ by {share:.2g} of the largest",
                remedy="use base and adapter together: leave --merge out; please report the model's type",
            )
        )


def fold_model(
    adapter: Path,
    folder: Path,
    settings: ModelSettings,
    kind: Any,
    *,
    quantised: frozenset[str],
    config_keys: dict[str, Any],
) -> None:
    """Write base + adapter as a whole model into `folder`.

    Args:
        quantised: names of weights that were held in 4 bits.
        config_keys: for its config.json.
    """
    model = load_pretrained(settings, kind, dtype=torch_dtype(settings), attention="eager")
    _round_as_quantised(model, quantised)
    grow_vocabulary(model, settings)
    attach_adapter(model, adapter)
    fold_adapter(model)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    if config_keys:
        write_json(folder / "config.json", read_json(folder / "config.json") | config_keys)


@torch.no_grad()
def _round_as_quantised(model: PreTrainedModel, names: frozenset[str]) -> None:
    """Give weights the values of their 4-bit forms; transposed ones are quantised as linear layers are."""
    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            weight: Any = module.weight
            is_transposed = isinstance(module, Conv1D)
            rounded = round_trip(weight.T if is_transposed else weight)
            weight.copy_(rounded.T if is_transposed else rounded)


def fold_adapter(model: PreTrainedModel) -> None:
    """Put each adapted layer's merged weights in its place, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    inner = {id(layer.base_layer) for layer in layers.values()}
    for name, layer in layers.items():
        if id(layer) in inner:
            continue  # another parameter's of the same experts
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _folded(layer))


@torch.no_grad()
def _folded(layer: Any) -> nn.Module:
    """The layer below one or several adapters, with all of them folded in."""
    below: nn.Module = layer.get_base_layer()
    dtypes = {name: parameter.dtype for name, parameter in below.named_parameters()}
    layer.float()
    while layer is not below:
        layer.merge()
        layer = layer.base_layer
    for name, parameter in below.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
        parameter.requires_grad_(True)
    return below
