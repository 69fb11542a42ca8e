"""From a YAML file and overrides to a checked `Recipe` with absolute paths.

In: a recipe's path and `--set a.b=c` strings. Out: a `Recipe`, or one `UserInputError` with every mistake
found.
Invariant: what comes out names only files that exist now; written into a run folder it means the same from
anywhere.
Trade-off: a path is tried relative to the recipe, then to the current folder (two look-ups per path), so
that a recipe works both next to its data and from a project's root.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sftcore.catalogue import CATALOGUE, folder_of, how_to_pull, meant_name
from sftcore.config import Recipe, Source
from sftcore.errors import Problem, UserInputError
from sftcore.paths import file_fault
from sftcore.wrong_values import UNKNOWN, Misfit, misfits
from sftcore.yaml_text import MAX_DEPTH, parse_yaml, read_yaml

ASSETS = Path(__file__).parent / "assets"
DS_CONFIGS = Path(__file__).parent / "ds_configs"
ASSET_PREFIX = "assets:"
HUB_PREFIX = "hub:"
WHOLE_STEP = "batch.samples_per_step (of the whole step, over all ranks)"
ELSEWHERE = {  # keys of transformers, TRL, peft, LLaMA-Factory and Axolotl -> ours, perhaps with a remark
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": f"{WHOLE_STEP}, or evaluate.batch_size",
    "train_batch_size": WHOLE_STEP,
    "micro_batch_size": WHOLE_STEP,
    "per_device_train_batch_size": WHOLE_STEP,
    "gradient_accumulation_steps": WHOLE_STEP,
    "per_device_eval_batch_size": "evaluate.batch_size",
    "gradient_checkpointing": "train.activation_checkpointing: full",
    "packing": "batch.capacity (samples are always packed)",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "target_modules": "adapter.targets",
    "finetuning_type": "adapter.kind",
    "load_in_4bit": "adapter.kind: qlora",
    "lr_scheduler_type": "train.scheduler",
    "lr_scheduler": "train.scheduler",
    "warmup_steps": "train.warmup_ratio (a share of the steps)",
    "max_steps": "train.epochs (or sftcore train --max-steps N)",
    "min_lr_rate": "train.min_lr_ratio",
    "cosine_min_lr_ratio": "train.min_lr_ratio",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.eps",
    "optim": "train.optimizer",
    "bf16": "model.dtype: bfloat16 (auto takes it where the hardware has it)",
    "fp16": "model.dtype: bfloat16",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "report_to": "tracking.to",
    "output_dir": "run",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "dataset": "data.train",
    "datasets": "data.train",
    "save_steps": "checkpoint.save_every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "train.evaluate_every_steps",
    "early_stopping_patience": "train.patience",
    "load_best_model_at_end": "train.keep: best",
}
MAX_FILES = 100_000  # of a source
SEE_KEYS = "`sftcore schema --markdown` prints all keys with what they take"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # "org/name" or "name"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override, check and resolve a recipe.

    Paths in the result are absolute (hub names and `assets:` paths stay as they are), so the resolved recipe
    written into a run folder means the same from anywhere.

    Args:
        path: YAML file.
        overrides: `a.b=value` strings; the value is parsed as YAML.

    Raises:
        UserInputError: with every mistake found: syntax, unknown keys, values, missing files.
    """
    raw = _read_recipe(path)
    problems = [p for override in overrides or [] if (p := _apply_override(raw, override))]
    problems += _resolve_paths(raw, path)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        said = [override.partition("=")[0].strip() for override in overrides or []]
        found = [_explain(item, _origin(item.location, path, said)) for item in misfits(error.errors())]
        raise UserInputError(*problems, *found) from error
    if problems:
        raise UserInputError(*problems)
    return recipe


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values, checked as a whole; keys that nobody set stay unset.

    Args:
        values: by dotted key; a section may be given as its keys in a mapping.

    Raises:
        UserInputError: with every mistake.

    >>> small = Recipe(model={"path": "m"}, data={"train": [{"format": "facts", "path": "f"}]},
    ...                batch={"samples_per_step": 8})
    >>> changed(small, **{"batch.samples_per_step": 4, "name": "b"}).batch.samples_per_step
    4
    """
    raw = recipe.model_dump(exclude_unset=True)
    for key, value in values.items():
        *parents, last = key.split(".")
        target = raw
        for part in parents:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[last] = value
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        found = [
            _explain(item, ".".join(map(str, item.location)) or "recipe") for item in misfits(error.errors())
        ]
        raise UserInputError(*found) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _read_recipe(path: Path) -> dict[str, Any]:
    if file_fault(path) == "no such file":
        remedy = "see recipes/ for some to copy, or give the folder of a run"
        raise UserInputError(Problem(what="no such recipe", where=str(path), remedy=remedy))
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserInputError(
            Problem(what="a recipe is a YAML mapping", where=str(path), got=type(raw).__name__)
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> Problem | None:
    """Set one dotted key in place; list positions are numbers (`data.train.0.limit=10`)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return Problem(what="an override is written a.b=value", where="--set", got=override)
    target: Any = raw
    *parents, last = key.strip().split(".")
    if len(parents) > MAX_DEPTH:
        return Problem(what=f"a key of {len(parents) + 1:,} parts", where=f"--set {key}")
    for part in parents:
        if isinstance(target, list) and _is_position(part, target):
            target = target[int(part)]
        elif isinstance(target, dict):
            if not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[part]
        else:
            return Problem(what=f"no such place in the recipe: {part!r}", where=f"--set {key}")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        remedy = f"put the value in quotes: --set '{key}=\"...\"'"
        return Problem(what=f"not a YAML value: {error}", where=f"--set {key}", got=text, remedy=remedy)
    if isinstance(target, list):
        if not _is_position(last, target):
            return Problem(what=f"no such list position: {last!r}", where=f"--set {key}")
        target[int(last)] = value
    else:
        target[last] = value
    return None


def _is_position(text: str, items: list[Any]) -> bool:
    """Whether a text is a number that counts up to one of the items."""
    return len(text) <= 6 and text.isascii() and text.isdigit() and int(text) < len(items)


def _origin(location: tuple[str | int, ...], path: Path, overrides: list[str]) -> str:
    """Where a wrong value was given: in the file, or on the command line."""
    key = ".".join(map(str, location))
    if any(f"{key}.".startswith(f"{override}.") for override in overrides):
        return f"--set {key}"
    return f"{path}: {key or 'recipe'}"


def _explain(misfit: Misfit, where: str) -> Problem:
    """One wrong key as a `Problem`, with the most likely name for an unknown one."""
    if misfit.kind == UNKNOWN:
        allowed = _keys_at(misfit.location[:-1])
        remedy = _hint(str(misfit.location[-1]), allowed)
        return Problem(what=misfit.what, where=where, allowed=", ".join(allowed), remedy=remedy)
    remedy = misfit.remedy or (SEE_KEYS if misfit.allowed else "")
    return Problem(what=misfit.what, where=where, got=misfit.got, allowed=misfit.allowed, remedy=remedy)


def _hint(key: str, allowed: list[str]) -> str:
    """The key that was meant: another tool's, another section's, or a misspelt one.

    >>> [_hint("learning_rate", []), _hint("lr", []), _hint("lrr", ["lr", "epochs"])]
    ['here it is train.lr', "did you mean 'train.lr'?", "did you mean 'lr'?"]
    """
    if key in ELSEWHERE:
        return f"here it is {ELSEWHERE[key]}"
    sections = {name: _section_of(field.annotation) for name, field in Recipe.model_fields.items()}
    found = [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]
    found = found or difflib.get_close_matches(key, allowed, n=1)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else ""


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """Valid keys of the section that `location` leads to."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int) or part not in getattr(section, "model_fields", {}):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    """The `Settings` class inside an annotation such as `list[Source]` or `SelectSettings | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if inner is not types.NoneType and (found := _section_of(inner)):
            return found
    return None


def _resolve_paths(raw: dict[str, Any], recipe_path: Path) -> list[Problem]:
    """Make the paths in `raw` absolute, in place; report what does not exist; skip what has a wrong type."""
    problems = []
    base = recipe_path.resolve().parent
    model, data = raw.get("model"), raw.get("data")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"], problem = _resolve_model(model["path"], base)
        problems.append(problem)
    if isinstance(model, dict) and isinstance(model.get("chat_template"), str):
        model["chat_template"], problem = _resolve_template(model["chat_template"], base)
        problems.append(problem)
    for split in ("train", "valid", "test", "ood"):
        sources = data.get(split) if isinstance(data, dict) else None
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                source["path"], problem = _resolve_source(source["path"], base, f"data.{split}.{number}.path")
                problems.append(problem)
    train = raw.get("train")
    if isinstance(train, dict) and isinstance(train.get("init_adapter"), str):
        train["init_adapter"], problem = _resolve_adapter(train["init_adapter"], base)
        problems.append(problem)
    if isinstance(data, dict) and isinstance(data.get("relations"), str):
        data["relations"], problem = _resolve_file(data["relations"], base, "data.relations")
        problems.append(problem)
    if isinstance(raw.get("deepspeed", "zero1"), str):
        raw["deepspeed"], problem = _resolve_deepspeed(raw.get("deepspeed", "zero1"), base)
        problems.append(problem)
    return [p for p in problems if p]


def _resolve_model(text: str, base: Path) -> tuple[str, Problem | None]:
    """A folder, also that of a model which `sftcore model pull` fetched by this name; else a hub name."""
    for folder in (base / text, Path(text), folder_of(text), base / folder_of(text)):
        if text and os.path.isdir(folder):  # no error of a name that can't be one
            return str(folder.resolve()), None
    name = meant_name(text)
    if HUB_NAME.fullmatch(text) and text[0] not in "./~" and name is None:
        return text, None
    if name is None:
        remedy = "give a Hugging Face model folder or a hub name, or one of " + ", ".join(CATALOGUE)
        return text, Problem(what="no such model folder", where="model.path", got=text, remedy=remedy)
    what = "this model was not pulled yet" if name == text else "no such model folder"
    meant = "" if name == Path(text).name else f"did you mean {name}? "
    return text, Problem(what=what, where="model.path", got=text, remedy=f"{meant}run: {how_to_pull(text)}")


def _resolve_adapter(text: str, base: Path) -> tuple[str, Problem | None]:
    for folder in (base / text, Path(text)):
        if os.path.isfile(folder / "adapter_config.json"):
            return str(folder.resolve()), None
    remedy = "give a peft folder with adapter_config.json, such as runs/NAME/adapter"
    return text, Problem(what="no adapter there", where="train.init_adapter", got=text, remedy=remedy)


def _resolve_source(text: str, base: Path, where: str) -> tuple[str, Problem | None]:
    if text.startswith(HUB_PREFIX):
        return text, None
    shipped = text.startswith(ASSET_PREFIX)
    folders = (ASSETS,) if shipped else (base, Path.cwd())
    name = text.removeprefix(ASSET_PREFIX)
    for folder in folders:
        for candidate in (str(folder / name), os.path.join(glob.escape(str(folder)), name)):
            if files := _matches(candidate):
                return (text if shipped else candidate), _unreadable(files, where)
    remedy = "paths are relative to the recipe, then to the current folder; see docs/data.md"
    return text, Problem(what="no file matches", where=where, got=text, remedy=remedy)


def _unreadable(files: list[str], where: str) -> Problem | None:
    """What is wrong with files of a source: pipes, devices, links that lead nowhere; too many of them."""
    if len(files) > MAX_FILES:
        return Problem(what=f"over {MAX_FILES:,} files match", where=where, remedy="name the folder apart")
    faults = [(file, fault) for file in files if not os.path.isdir(file) and (fault := file_fault(file))]
    if not faults:
        return None
    return Problem(what=faults[0][1], where=where, got=", ".join(file for file, _ in faults[:3]))


def source_files(source: Source) -> list[Path]:
    """The files or data set folders of a resolved source, sorted; a `hub:` name stands for itself."""
    text = source.path
    if text.startswith(HUB_PREFIX):
        return [Path(text)]
    pattern = str(ASSETS / text.removeprefix(ASSET_PREFIX)) if text.startswith(ASSET_PREFIX) else text
    return [Path(name) for name in _matches(pattern)]


def _matches(pattern: str) -> list[str]:
    """The path of this very name, or else the sorted matches of a glob; `**` goes through folders."""
    if os.path.lexists(pattern):
        return [pattern]
    if "\0" in pattern:
        return []
    return sorted(itertools.islice(glob.iglob(pattern, recursive=True), MAX_FILES + 1))


def _resolve_template(text: str, base: Path) -> tuple[str, Problem | None]:
    """A file's path; a bare name is one of the tokenizer's own templates, checked when that is read."""
    found, problem = _resolve_file(text, base, "model.chat_template")
    is_name = "/" not in text and "." not in text
    return (text, None) if problem and is_name else (found, problem)


def _resolve_file(text: str, base: Path, where: str) -> tuple[str, Problem | None]:
    for file in (base / text, Path(text)):
        if os.path.isfile(file):
            return str(file.resolve()), None
    return text, Problem(what="no such file", where=where, got=text)


def _resolve_deepspeed(text: str, base: Path) -> tuple[str, Problem | None]:
    for file in (DS_CONFIGS / f"{text}.json", base / text, Path(text)):
        if os.path.isfile(file):
            return (text if file.parent == DS_CONFIGS else str(file.resolve())), None
    names = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
    return text, Problem(what="no such DeepSpeed configuration", where="deepspeed", got=text, allowed=names)


def deepspeed_file(recipe: Recipe) -> Path:
    """The JSON file of a resolved recipe's DeepSpeed configuration."""
    shipped = DS_CONFIGS / f"{recipe.deepspeed}.json"
    return shipped if os.path.isfile(shipped) else Path(recipe.deepspeed)
