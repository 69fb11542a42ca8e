"""Loading: a model folder or hub name -> a model that trains on packs, or one that decodes.

In: the recipe's model section. Out: a transformers model; for training, with our attention, layers and head.
Invariant: before a model is trained its packs are proven (`proof`), and what its configuration asks for and
training doesn't give is refused (`demands`).
Trade-off: the proof costs a few forwards at every start and holds for any architecture, where a list of known
ones would be out of date.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.utils.logging import disable_progress_bar

from sftcore import dist
from sftcore.catalogue import how_to_pull
from sftcore.config import ModelSettings, Recipe
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.heap import forget_old_kernels, keep_freed_memory
from sftcore.model.adapters import (
    add_adapter,
    attach_adapter,
    fill_adapter,
    is_adapter,
    train_whole_layers,
)
from sftcore.model.attention import choose_attention
from sftcore.model.demands import check_demands, warn_of_ignored
from sftcore.model.forward import placed_on
from sftcore.model.identity import base_of
from sftcore.model.loss import choose_head
from sftcore.model.ours import install_head, slim_layers
from sftcore.model.proof import NOT_PACKED, prove_head_and_packs, refusing
from sftcore.model.quantise import keep_trainable_layout, quantisation_settings
from sftcore.model.reach import freeze_unreached
from sftcore.model.trial import Way, try_code
from sftcore.model.vocabulary import grow_vocabulary
from sftcore.model.weight_files import check_weight_files
from sftcore.precision import DTYPES, dtype_of, torch_dtype

log = logging.getLogger(__name__)


def load_for_training(
    recipe: Recipe,
    *,
    kind: Any = AutoModelForCausalLM,
    sharded_by: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model with per-document attention and the trained-token head, proven on packs, and its adapter.

    Args:
        kind: an Auto class whose models have a vocabulary or a classifier at their end.
        sharded_by: a ZeRO-3 configuration of DeepSpeed: each weight is cut up over the ranks as it is read,
            so that no rank holds them all; the caller then calls `prove_head_and_packs` with the engine.
        options: for its `from_pretrained`.

    Raises:
        UserInputError: no model there, or one that can't be trained in packs; wrong adapter targets.
    """
    forget_old_kernels()
    settings = recipe.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(settings)
    check_demands(recipe, config)
    warn_of_ignored(config)
    try_code(config, Way.of(recipe, kind=kind))
    with refusing(config.model_type, NOT_PACKED):
        attention = choose_attention(config, settings.attention, dtype=dtype_of(settings), device=device)
    dtype = torch_dtype(settings)
    if recipe.adapter.kind == "qlora":
        options["quantization_config"] = quantisation_settings(dtype)
    # from_pretrained shards the weights as it reads them, as long as this object lives
    sharding = HfDeepSpeedConfig(sharded_by) if sharded_by is not None else None
    with refusing(config.model_type, NOT_PACKED):
        model = load_pretrained(settings, kind, dtype=dtype, attention=attention, **options)
    del sharding
    grow_vocabulary(model, settings)
    model.config.use_cache = False
    log.info("own backward: %d norms, %d gated MLPs", *slim_layers(model))
    install_head(
        model,
        z_loss=recipe.train.z_loss,
        label_smoothing=recipe.train.label_smoothing,
        kind=choose_head(settings.head if kind is AutoModelForCausalLM else "chunked", device=device),
    )
    if sharded_by is None:
        with placed_on(model, dist.device()):
            prove_head_and_packs(model)
    if recipe.adapter.kind == "none":
        freeze_unreached(model)
    else:
        saved = Path(recipe.train.init_adapter) if recipe.train.init_adapter else None
        add_adapter(model, recipe.adapter, seed=recipe.training_seed, saved=saved)
        train_whole_layers(model, vocabulary=bool(settings.add_tokens), saved=saved)
        if saved is not None:
            fill_adapter(model, saved, is_trained=True)
    return model


def load_for_decoding(
    settings: ModelSettings,
    *,
    dtype: str | None = None,
    quantised: bool = False,
    attention: str | None = None,
    kind: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """The model as transformers decodes with it, on the GPU if there is one.

    Args:
        settings: its path may be an adapter folder: its base is loaded, with the adapter next to the layers.
        quantised: hold the base in 4 bits, as QLoRA trained it.
        attention: name of a registered attention; None: what decodes fastest.
        kind: the Auto class to load with.
    """
    forget_old_kernels()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapter = Path(settings.path) if is_adapter(Path(settings.path)) else None
    if adapter:
        settings = settings.model_copy(update={"path": base_of(adapter)})
    own_dtype = DTYPES[dtype] if dtype else torch_dtype(settings)
    attention = attention or ("sdpa" if device == "cuda" else "eager")  # 1.3 times as fast a token on CPUs
    options = {"quantization_config": quantisation_settings(own_dtype)} if quantised else {}
    model = load_pretrained(settings, kind, dtype=own_dtype, attention=attention, **options)
    grow_vocabulary(model, settings)
    if adapter:
        attach_adapter(model, adapter)
    ready = model.eval().to(device)
    keep_trainable_layout(ready.modules())
    keep_freed_memory()
    return ready


def load_config(settings: ModelSettings) -> Any:
    """The model's configuration.

    Raises:
        UserInputError: there is none, or it is not a causal LM's.
    """
    try:
        config = AutoConfig.from_pretrained(settings.path, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _not_loadable(settings.path, error) from error
    if not settings.trust_remote_code:
        vars(config).pop("auto_map", None)  # transformers' own code is taken, wherever the model is built
    return config


def load_pretrained(
    settings: ModelSettings, kind: Any, *, dtype: torch.dtype, attention: str, **options: Any
) -> PreTrainedModel:
    """A model of `kind`, an Auto class.

    Raises:
        UserInputError: the folder holds none.
        MissingEnvironmentError: a hub name that can't be reached.
    """
    disable_progress_bar()  # transformers' own; ours tell of stages
    check_weight_files(Path(settings.path))
    try:
        return kind.from_pretrained(
            settings.path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loadable(settings.path, error) from error


def _not_loadable(path: str, error: Exception) -> UserInputError | MissingEnvironmentError:
    """A hub name that can't be reached is the environment's lack; a folder without a model is the user's."""
    first_line = str(error).strip().split("\n")[0]
    if path.startswith("/"):
        return UserInputError(
            Problem(
                what=f"no causal LM can be loaded from this folder: {first_line}",
                where=f"model.path {path}",
                remedy="it needs config.json, *.safetensors and tokenizer files as Hugging Face saves them",
            )
        )
    return MissingEnvironmentError(
        Problem(
            what=f"can't get this model from the hub: {first_line}",
            where=f"model.path {path}",
            remedy=f"where there is a network: {how_to_pull(path)}; or give a model folder",
        )
    )
