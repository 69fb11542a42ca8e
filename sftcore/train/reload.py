"""The proof of an export: what the folder gives when it is loaded again is what was trained.

In: a folder that is not finished, digests of all weights and logits of a few tokens as training has them.
Out: nothing, or `TrainingFailed`, whereupon the folder goes.
Invariant: every weight and buffer of the trained model has its value, to the bit, in the model that
transformers makes of the folder, and that model gives the same logits.
Trade-off: the model is held a second time, on the host, for a load and a forward of 12 tokens (1 s for 135M
parameters on two cores); where it doesn't fit, the files alone are read again and compared with what was
written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from sftcore.config import Recipe
from sftcore.errors import Problem, TrainingFailed
from sftcore.model.adapters import attach_adapter
from sftcore.model.classifier import restore_classifier
from sftcore.model.load import load_pretrained
from sftcore.model.quantise import quantisation_settings
from sftcore.model.sameness import distance, has_room_for, is_same, probe_tokens
from sftcore.model.vocabulary import grow_vocabulary
from sftcore.objectives import Objective
from sftcore.precision import torch_dtype
from sftcore.train.engine import Engine, whole_size

MAX_NAMED = 3
Named = tuple[str, torch.Tensor]


@dataclass(kw_only=True)
class Trained:
    """What was trained, as an export has to give it back.

    Args:
        objective: that was trained.
        ids: of a few tokens.
        logits: of these tokens.
        num_bytes: of the whole model in the dtype that it is loaded in.
        digests: of each weight and buffer by name, with its dtype; filled as they are written.
    """

    objective: Objective
    ids: torch.Tensor
    logits: torch.Tensor
    num_bytes: int
    digests: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)

    def noting(self, weights: Iterable[Named]) -> Iterator[Named]:
        """The weights as they come, noted on the way."""
        for name, tensor in weights:
            self.digests[name] = tensor.dtype, digest_of(tensor)
            yield name, tensor


def observe(engine: Engine, config: Any, recipe: Recipe) -> Trained:
    """What the trained model gives; all ranks call it.

    Args:
        config: as it will be saved: the tokens are none that it pads with.
    """
    ids, objective = probe_tokens(config), engine.objective
    model = objective.causal_lm
    with engine.autocast(), engine.gathering():
        logits = objective.probe_logits(model, ids)
    return Trained(
        objective=objective,
        ids=ids,
        logits=logits,
        num_bytes=sum(whole_size(p) for p in model.parameters()) * torch_dtype(recipe.model).itemsize,
    )


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fits_again(recipe: Recipe, trained: Trained) -> bool:
    """Whether the model fits into this machine's memory a second time."""
    is_on_gpu = recipe.adapter.kind == "qlora" and torch.cuda.is_available()  # 4 bits are made there
    return not is_on_gpu and has_room_for(trained.num_bytes)


def check_export(folder: Path, recipe: Recipe, trained: Trained) -> None:
    """Load `folder` as its users will and compare.

    Raises:
        TrainingFailed: it gives another model.
    """
    with torch.random.fork_rng(devices=[]):  # a classifier's layer is drawn before its weights are read
        model = _load(folder, recipe, trained.objective)
    if wrong := _other_weights(model, trained):
        raise _unequal(f"{len(wrong)} of {len(trained.digests)} weights: {', '.join(wrong[:MAX_NAMED])}")
    found = trained.objective.probe_logits(model, trained.ids)
    share = distance(found, trained.logits, dtype=model.dtype, config=model.config)
    if not is_same(share, model.dtype):
        raise _unequal(f"the weights are right, but logits are off by {share:.2g} of the largest")


def _load(folder: Path, recipe: Recipe, objective: Objective) -> PreTrainedModel:
    """The model of an export as transformers loads it, on the host."""
    is_adapter = recipe.adapter.kind != "none"
    settings = recipe.model if is_adapter else recipe.model.model_copy(update={"path": str(folder)})
    dtype = torch_dtype(recipe.model)
    options: dict[str, Any] = {}
    if recipe.adapter.kind == "qlora":
        options["quantization_config"] = quantisation_settings(dtype)
    if is_adapter and objective.num_outputs:
        options["num_labels"] = objective.num_outputs
    model = load_pretrained(settings, objective.auto_class, dtype=dtype, attention="eager", **options)
    if is_adapter:
        grow_vocabulary(model, settings)
        attach_adapter(model, folder)
    elif objective.num_outputs:
        restore_classifier(model, folder)
    return model


def _other_weights(model: PreTrainedModel, trained: Trained) -> list[str]:
    """Names of trained weights that the model lacks, or has with another shape or other values."""
    held = model.state_dict()
    return [
        name
        for name, (dtype, digest) in trained.digests.items()
        if name not in held or digest_of(held[name].to(dtype)) != digest
    ]


def check_files(folder: Path, written: Iterable[tuple[str, dict[str, str]]]) -> None:
    """Read the weights of each file again: (file, {name: digest}).

    Raises:
        TrainingFailed: they are not what was written.
    """
    for file, digests in written:
        with safe_open(folder / file, framework="pt") as tensors:
            found = {name: digest_of(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        if found != digests:
            wrong = sorted(name for name in found | digests if found.get(name) != digests.get(name))
            raise _unequal(f"{file}: {', '.join(wrong[:MAX_NAMED])}")


def _unequal(got: str) -> TrainingFailed:
    return TrainingFailed(
        Problem(
            what="the exported model, loaded again, is not the one that was trained; no result was written",
            got=got,
            remedy="the last checkpoint has the trained weights; please report this model's type",
        )
    )
