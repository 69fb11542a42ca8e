"""What makes a model folder this model: the files that decide its numbers, and their fingerprint.

In: a model or adapter folder, or a hub name. Out: the files; a hash of their names and bytes.
Invariant: two folders with one fingerprint give the same numbers; notes next to a model (README, licence) and
what training left (optimizer states) are not in it.
Trade-off: of weights in two formats both count, though only one is loaded: a needless second probe where the
other changes, never another model's levels. 16 GB are read at about 1 GB/s.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of, read_object, sha256_of_file

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"  # names tokens that end a text
CONFIGS = ("config.json", ADAPTER_CONFIG, GENERATION_CONFIG)
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")
TOKENIZERS = (  # names that transformers' tokenizers write and read
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.*"),
)
CODE = ("*.py",)  # of models that need trust_remote_code
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # under which a model may be handed on
LEFTOVERS = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*")  # of a training run


def model_files(folder: Path) -> list[Path]:
    """The files of a model or adapter folder that decide its numbers, by name."""
    patterns = (*CONFIGS, *WEIGHTS, *TOKENIZERS, *CODE)
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(file.match(name) for name in LEFTOVERS))


def copy_files(source: Path, folder: Path, *patterns: str) -> None:
    """Copy the files of these patterns, where there are any."""
    for file in (file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
        shutil.copy(file, folder)


def fingerprint_model(path: str) -> str:
    """Identity of a model folder, or of an adapter folder with its base; a hub name stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    identity = {file.name: sha256_of_file(file) for file in model_files(folder)}
    if (folder / ADAPTER_CONFIG).is_file():
        identity["base"] = fingerprint_model(base_of(folder))
    return fingerprint_of(identity)


def base_of(folder: Path) -> str:
    """The base model that an adapter folder names.

    Raises:
        UserInputError: it names none.
    """
    path, key = folder / ADAPTER_CONFIG, "base_model_name_or_path"
    base = read_object(path, key)[key]
    if not isinstance(base, str) or not base:
        raise UserInputError(
            Problem(
                what="names no base",
                where=f"{path}: {key}",
                got=repr(base)[:80],
                allowed="a folder or a name",
            )
        )
    return base
