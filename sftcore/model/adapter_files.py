"""An adapter's configuration as peft wrote it: read with its types checked, and what of it can be trained on.

In: a peft folder, the recipe. Out: its values, peft's own configuration of them, or a `UserInputError`.
Invariant: what is damaged or can't be trained on is refused with the file's name before anything is
tokenised; weights that training would leave out of its export are among it.
Trade-off: the keys that we or peft's LoRA compute with are checked, 15 of about 50; peft judges the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sftcore.config import AdapterSettings, Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import DAMAGED, read_json, read_object
from sftcore.model.identity import ADAPTER_CONFIG

PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
COMPARED = {  # keys of adapter_config.json that have to agree -> what the recipe calls them
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
OF_LORA = ("r", "lora_alpha", "target_modules")  # keys that each version of peft has written
VOCABULARY_LAYERS = frozenset(  # last names of embeddings and output layers in transformers' decoders
    "embed_tokens lm_head wte embed_in embed_out word_embeddings tok_embeddings output".split()
)
BREAKS = (TypeError, ValueError, LookupError, AttributeError)  # what peft raises of values that it can't use


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or is_list or isinstance(value, str)


def _are_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return value is None or all(type(number) is int for number in numbers)


def _are_by_pattern(value: Any, is_one: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(is_one, value.values())))


EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a name, such as LORA"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a folder or a name"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "target_modules": (_are_names, "a list of names, or a pattern"),
    "exclude_modules": (_are_names, "a list of names, or a pattern"),
    "layers_to_transform": (_are_numbers, "a number, or a list of numbers"),
    "layers_pattern": (_are_names, "a name, or a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "bias": (lambda value: isinstance(value, str), "none, all or lora_only"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: _are_by_pattern(value, _is_rank), "whole numbers above 0 by pattern"),
    "alpha_pattern": (lambda value: _are_by_pattern(value, _is_number), "numbers by pattern"),
}


def adapter_values(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds.

    Raises:
        UserInputError: it lacks a key, or holds a value of another type; all of these at once.
    """
    path = folder / ADAPTER_CONFIG
    values = read_object(path, "peft_type")
    if values["peft_type"] == "LORA":
        values = read_object(path, *OF_LORA)
    problems = [
        Problem(what="damaged", where=f"{path}: {key}", got=repr(values[key])[:80], allowed=allowed)
        for key, (is_valid, allowed) in EXPECTED.items()
        if key in values and not is_valid(values[key])
    ]
    if problems:
        raise UserInputError(*problems)
    return values


def read_adapter(folder: Path) -> Any:
    """A folder's adapter as peft's own configuration; keys that its peft did not know have defaults.

    Raises:
        UserInputError: it is damaged.
    """
    from peft import PeftConfig  # 3 s, and it loads bitsandbytes: only adapter runs pay

    adapter_values(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except BREAKS as error:
        line = " ".join(str(error).split())[:200]
        where = str(folder / ADAPTER_CONFIG)
        what = f"peft can't read this: {type(error).__name__}: {line}"
        raise UserInputError(Problem(what=what, where=where, remedy=DAMAGED)) from error


def adapter_to_continue(folder: Path, settings: AdapterSettings) -> Any:
    """The configuration of a saved adapter, to be trained on.

    Raises:
        UserInputError: it was trained with other settings than the recipe's, or can't be trained on.
    """
    config = read_adapter(folder)
    odd = _untrainable(config, folder)
    if problems := odd if _kind_of(config) != "LORA" else _differences(config, settings, folder) + odd:
        raise UserInputError(*problems)
    config.inference_mode = False
    config.lora_dropout = settings.dropout
    return config


def check_continued(recipe: Recipe) -> None:
    """Refuse an adapter to go on from that training can't go on from, by its files alone.

    Raises:
        UserInputError: as `adapter_to_continue`, or it has layers that were trained whole, and the recipe's
            training has none.
    """
    if recipe.train.init_adapter is None:
        return
    folder = Path(recipe.train.init_adapter)
    config = adapter_to_continue(folder, recipe.adapter)
    if config.modules_to_save and not recipe.model.add_tokens and not recipe.classifies:
        carried = vocabulary_trained(folder)
        whole = [name for name in _names_of_weights(folder) if not is_update(name)]
        if lost := [name for name in whole if name.rpartition(".")[0] not in carried]:
            raise UserInputError(whole_layers(lost, folder))


def vocabulary_trained(folder: Path) -> set[str]:
    """Names of the embedding and the output layer, as far as an adapter has them in its `modules_to_save`."""
    saved = adapter_values(folder).get("modules_to_save") or []
    asked = {name.rpartition(".")[2] for name in saved} & VOCABULARY_LAYERS
    names = {name.rpartition(".")[0] for name in _names_of_weights(folder) if not is_update(name)}
    return {name for name in names if name.rpartition(".")[2] in asked}


def whole_layers(names: list[str], folder: Path) -> Problem:
    """The refusal of weights that were trained whole and would stay out of what training exports."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return Problem(
        what="this adapter has layers that were trained whole, and training would not go on with these",
        where=str(folder / ADAPTER_WEIGHTS),
        got=", ".join(names[:3]) + more,
        allowed="the embedding and the output layer of a causal LM, a classifier's last layer",
        remedy="merge it into its base (peft's merge_and_unload, or sftcore export --merge of its run), and"
        " train a fresh adapter on that",
    )


def _names_of_weights(folder: Path) -> list[str]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return []
    with safe_open(file, "pt") as weights:
        return sorted(name.removeprefix(PREFIX) for name in weights.keys())  # noqa: SIM118


def is_update(name: str) -> bool:
    """Whether a weight of an adapter's file is a low-rank update, rather than a layer trained whole."""
    return ".lora_" in name


def _kind_of(config: Any) -> str:
    return str(config.peft_type.value)


def _differences(config: Any, settings: AdapterSettings, folder: Path) -> list[Problem]:
    """What the recipe says otherwise than the saved adapter, whose targets are listed one by one."""
    given, found = settings.model_dump(), config.to_dict()
    pairs = [(name, found[key], given[name]) for key, name in COMPARED.items()]
    return [
        Problem(
            what=f"the adapter to go on from has another {name}",
            where=str(folder),
            got=str(_plain(saved)),
            allowed=str(_plain(ours)),
            remedy=f"set adapter.{name} as it was trained",
        )
        for name, saved, ours in pairs
        if _plain(saved) != _plain(ours) and ours != "all-linear"
    ]


def _plain(value: Any) -> Any:
    """A peft setting as it can be compared: sets and lists alike."""
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _untrainable(config: Any, folder: Path) -> list[Problem]:
    known = vars(config)
    drawn = known.get("init_lora_weights")
    odd = {
        "peft_type": _kind_of(config) != "LORA",
        "bias": known.get("bias", "none") != "none",
        "init_lora_weights": isinstance(drawn, str) and drawn != "gaussian",
        "trainable_token_indices": bool(known.get("trainable_token_indices")),
        "layer_replication": bool(known.get("layer_replication")),
    }
    found = {key: known[key] for key, is_odd in odd.items() if is_odd}
    written = read_json(folder / ADAPTER_CONFIG)  # what this peft does not know, it would leave out
    found |= {key: value for key, value in written.items() if value and key not in known}
    return [
        Problem(what="an adapter of this kind can't be trained on", where=f"{folder}: {key}", got=str(value))
        for key, value in found.items()
    ]
