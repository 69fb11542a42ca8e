"""The code of models that need `trust_remote_code`: it travels with what was made of them.

In: a model folder or hub name, a folder that has its configuration. Out: the same *.py files there, and
configurations that name them there.
Invariant: what is written loads without the base, and never code from a place that the base did not name.
Trade-off: all of the base's *.py files are copied, for which of them import which is known to Python alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sftcore.fsio import read_json, write_json

NAMING_FILES = ("config.json", "tokenizer_config.json", "processor_config.json")  # they may hold auto_map


def local_folder(path: str, patterns: tuple[str, ...]) -> Path:
    """A model's folder; of a hub name the one in the hub's cache, with the files of these patterns."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(patterns)))


def is_trusted(config: Any) -> bool:
    """Whether a configuration (see `load_config`) stands for a model's own code, which the user trusts."""
    return bool(vars(config).get("auto_map"))


def copy_code(base: Path, folder: Path) -> None:
    """Copy a model's code next to what was made of it, and let the configurations there name it."""
    for file in sorted(base.rglob("*.py")):
        target = folder / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    known = {name: _auto_map(base / name) for name in NAMING_FILES}
    for name in NAMING_FILES:
        if (folder / name).is_file() and (mapping := _auto_map(folder / name) or known[name]):
            config = read_json(folder / name)
            write_json(folder / name, config | {"auto_map": _without_repository(mapping)})


def _auto_map(file: Path) -> Any:
    return read_json(file).get("auto_map") if file.is_file() else None


def _without_repository(mapping: Any) -> Any:
    """Names of classes as they are in the folder: "org/name--modeling.Model" is "modeling.Model"."""
    if isinstance(mapping, dict):
        return {key: _without_repository(value) for key, value in mapping.items()}
    if isinstance(mapping, list):
        return [_without_repository(value) for value in mapping]
    return mapping.rpartition("--")[2] if isinstance(mapping, str) else mapping
