"""What a base model is called by others, and its licence, as far as its folder says.

In: a model folder or hub name. Out: a name without a local path; a licence as hubs write it, or nothing.
Invariant: nothing is guessed: a name comes from the hub's cache, from origin.json or is the folder's last; a
licence from the card's front matter, origin.json, or the text of a LICENSE file that names itself.
Trade-off: only what lies on this machine is read, so a hub name of which the cache has no card gets none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sftcore.errors import UserInputError
from sftcore.fsio import read_json

ORIGIN = "origin.json"  # what `sftcore model pull` writes
CARD = "README.md"
CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXTS = {  # what the beginning of a licence's text says -> its name on hubs
    "Apache License": "apache-2.0",
    "MIT License": "mit",
    "BSD 3-Clause License": "bsd-3-clause",
    "Gemma Terms of Use": "gemma",
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "Llama 3.1 Community License": "llama3.1",
    "META LLAMA 3 COMMUNITY LICENSE": "llama3",
    "LLAMA 3.2 COMMUNITY LICENSE": "llama3.2",
}
BEGINNING = 2000  # characters of a licence's text
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def base_name(path: str) -> str:
    """The hub name of a base model where it has one, else its folder's name.

    >>> base_name("/a/models--org--m/snapshots/0f3"), base_name("org/m"), base_name("/home/me/models/m-1b")
    ('org/m', 'org/m', 'm-1b')
    """
    if not path.startswith("/"):
        return path
    if cached := CACHED.search(f"{path}/"):
        return f"{cached['owner']}/{cached['name']}"
    return str(_origin(Path(path)).get("hub") or Path(path).name)


def is_on_hub(name: str) -> bool:
    """Whether a name can be one of a hub's."""
    return HUB_NAME.fullmatch(name) is not None


def base_licence(path: str) -> dict[str, str]:
    """The `license` keys of a base model's card, or what its folder says instead; empty if nothing does."""
    folder = _folder_of(path)
    if folder is None:
        return {}
    front = front_matter(folder / CARD)
    if isinstance(front.get("license"), str):
        keys = ("license", "license_name", "license_link")
        return {key: front[key] for key in keys if isinstance(front.get(key), str)}
    text = str(_origin(folder).get("licence", ""))
    for file in sorted(folder.glob("LICEN[SC]E*")):
        text += file.read_text(encoding="utf-8", errors="replace")[:BEGINNING]
    known = {words.lower(): name for words, name in TEXTS.items()} | {n.lower(): n for n in TEXTS.values()}
    lowered = text.lower()
    return next(({"license": name} for words, name in known.items() if words in lowered), {})


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the beginning of a model card; empty if there is none that can be read."""
    if not card.is_file():
        return {}
    found = FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _folder_of(path: str) -> Path | None:
    """The folder of a model; of a hub name the newest of this machine's cache, if there is one."""
    if path.startswith("/"):
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    for name in (CARD, "config.json"):
        if isinstance(found := try_to_load_from_cache(path, name), str):
            return Path(found).parent
    return None


def _origin(folder: Path) -> dict[str, Any]:
    try:
        values = read_json(folder / ORIGIN)
    except UserInputError:
        return {}
    return values if isinstance(values, dict) else {}
