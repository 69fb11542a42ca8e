"""Export: trained weights -> a folder that transformers (or peft) loads.

In: an engine, a tokenizer. Out: safetensors, configurations, tokenizer, a model card; of an adapter run a
peft folder with the tokenizer and a card.
Invariant: the folder appears whole, by rename, after everything in it was written and flushed; only copies
are edited: model, configuration and tokenizer stay as they are, for training may go on.
Trade-off: weights are gathered and written one shard at a time, so rank 0 holds at most `SHARD_BYTES` of them
(2 GB, or one layer) next to its own, whatever the model's size; then `reload` proves what was written.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from sftcore import dist
from sftcore.config import Recipe
from sftcore.data.chat import turn_ends
from sftcore.data.tokens import codec_of
from sftcore.errors import SftError, UserInputError
from sftcore.fsio import read_json, write_json
from sftcore.model.adapter_files import ADAPTER_WEIGHTS
from sftcore.model.adapters import write_adapter
from sftcore.model.classifier import CLASSIFIER_FILE, take_classifier
from sftcore.model.code import copy_code, local_folder
from sftcore.model.identity import CODE, GENERATION_CONFIG
from sftcore.model.weights import SHARD_BYTES, model_folder, shards_of, write_shards
from sftcore.precision import dtype_of
from sftcore.settings import MATCHING_FILE
from sftcore.tasks import TASKS
from sftcore.train.engine import Engine
from sftcore.train.model_card import write_card
from sftcore.train.reload import Trained, check_export, check_files, digest_of, fits_again, observe

log = logging.getLogger(__name__)
Named = tuple[str, torch.Tensor]


def export_weights(engine: Engine, tokenizer: Any, recipe: Recipe, *, folder: Path) -> None:
    """Write what was trained into `folder`, load it again and compare; all ranks must call it.

    Raises:
        MissingEnvironmentError: the disk is full; nothing is left there.
        TrainingFailed: weights are missing, or what is loaded is not what was trained; likewise. All ranks
            raise what rank 0 has met.
    """
    if engine.objective.num_outputs:
        tokenizer = _with_pad_token(tokenizer)
    config = _saved_config(engine, tokenizer, recipe)
    trained = observe(engine, config, recipe)
    weights = trained.noting(engine.gathered_weights())
    failure: SftError | None = None
    if dist.rank() == 0:
        try:
            with model_folder(folder) as temporary:
                _write_texts(engine, tokenizer, recipe, config=config, folder=temporary)
                _write_and_check(engine, weights, recipe, folder=temporary, trained=trained)
        except SftError as error:
            failure = error
    for _ in weights:  # all of them on other ranks; what a failure has left on this one
        pass
    if (first := dist.gather_objects(failure)[0]) is not None:
        raise failure or first


def _write_and_check(
    engine: Engine, weights: Iterable[Named], recipe: Recipe, *, folder: Path, trained: Trained
) -> None:
    fits = fits_again(recipe, trained)
    written = _write_weights(engine, weights, folder, recipe, notes_digests=not fits)
    write_card(recipe, folder)
    if fits:
        check_export(folder, recipe, trained)
    else:
        log.info("%s: its files are compared with what was trained; no room to load it", folder.name)
        check_files(folder, written)


def _write_texts(engine: Engine, tokenizer: Any, recipe: Recipe, *, config: Any, folder: Path) -> None:
    """All of an export but its weights and its card."""
    model = engine.objective.causal_lm
    if not engine.trains_adapter:
        config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
        if TASKS[recipe.task].talks and tokenizer.chat_template:
            _end_texts_with_turns(folder / GENERATION_CONFIG, tokenizer)
    tokenizer.save_pretrained(folder)
    if recipe.model.trust_remote_code:
        copy_code(local_folder(recipe.model.path, (*CODE, "*.json")), folder)
    if TASKS[recipe.task].answers == "labels":
        write_json(folder / MATCHING_FILE, _what_inference_needs(recipe))


def _what_inference_needs(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide prompts and predictions; paths of data are left out."""
    layouts: list[dict[str, Any]] = []
    for source in (*recipe.data.train, *recipe.data.test):
        columns = source.columns.model_dump(mode="json")
        layouts += [columns] if columns not in layouts else []
    return {
        "task": recipe.task,
        "model": {"path": "", "dtype": dtype_of(recipe.model)},
        "adapter": {"kind": recipe.adapter.kind},
        "data": {
            "train": [{"format": "pairs", "path": "", "columns": columns} for columns in layouts],
            "template": recipe.model_dump(mode="json")["data"]["template"],
        },
        "batch": {"samples_per_step": 1, "capacity": recipe.max_length},
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "matching": recipe.matching.model_dump(mode="json", exclude={"teacher"}),
    }


def _end_texts_with_turns(file: Path, tokenizer: Any) -> None:
    """Let `generate` end at the end of a turn, too: a base model's end of text may be another token.

    In the file, for transformers refuses to save a changed configuration with any odd key of the base's.
    """
    with contextlib.suppress(UserInputError):  # rows of prompt and completion don't need a verified template
        turn, _ = turn_ends(codec_of(tokenizer))
        config = read_json(file)
        known = config.get("eos_token_id")
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if turn not in ends:
            write_json(file, config | {"eos_token_id": [*ends, turn]})


def _with_pad_token(tokenizer: Any) -> Any:
    """A classifier's tokenizer: transformers finds the last real token of a row by the pad token."""
    if tokenizer.pad_token is not None:
        return tokenizer
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    return padding


def _saved_config(engine: Engine, tokenizer: Any, recipe: Recipe) -> Any:
    """A copy of the model's configuration as plain transformers is to read it.

    Never the model's own: its layers ask that one in each forward which attention they are to compute.
    """
    model = engine.objective.causal_lm
    config = copy.deepcopy(model.config)
    config.use_cache = True
    config.dtype = engine.save_dtype
    config._attn_implementation = "sdpa"
    config._name_or_path = recipe.name
    if not recipe.model.trust_remote_code:
        vars(config).pop("auto_map", None)  # transformers' own code was trained
    whole = model if recipe.matching.has_plain_classifier else model.get_decoder()
    config.architectures = [type(whole).__name__]
    if engine.objective.num_outputs:
        config.id2label = dict(enumerate(recipe.matching.labels.en))
        config.label2id = {word: number for number, word in config.id2label.items()}
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return config


def _write_weights(
    engine: Engine, weights: Iterable[Named], folder: Path, recipe: Recipe, *, notes_digests: bool
) -> list[tuple[str, dict[str, str]]]:
    """Write a whole model's weights, or a peft folder; each file's digests, if they are to be noted."""
    model = engine.objective.causal_lm
    if engine.trains_adapter:
        named = write_adapter(model, dict(weights), folder)
        return [(ADAPTER_WEIGHTS, _digests(named))] if notes_digests else []
    is_whole = recipe.matching.has_plain_classifier
    classifier: dict[str, torch.Tensor] = {}
    shards = shards_of(weights if is_whole else take_classifier(weights, classifier), SHARD_BYTES)
    noted: list[dict[str, str]] = []

    def saved() -> Iterator[dict[str, torch.Tensor]]:
        for shard in shards:
            converted = revert_weight_conversion(model, shard)
            noted.append(_digests(converted) if notes_digests else {})
            yield converted

    files = write_shards(saved(), folder)
    if classifier:
        save_file(classifier, folder / CLASSIFIER_FILE, metadata={"format": "pt"})
    return list(zip(files, noted, strict=True)) if notes_digests else []


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest_of(tensor) for name, tensor in tensors.items()}
