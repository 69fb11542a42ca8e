"""Packages that the GPU benchmark needs or can use: which are missing, and how to bring them.

In: the installed distributions. Out: one message for what it can't start without, one for what it leaves out.
Invariant: it imports nothing but the standard library, so that it can speak where the rest can't be imported.
Trade-off: a package's own requirements are looked at one level deep; deeper ones appear in a row's `reason`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import metadata

CARRIED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "orjson")
NEEDED = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "PyYAML", *CARRIED)
OPTIONAL = {  # what is left out without it
    "deepspeed": "steps run in a plain loop without float32 masters; no ZeRO rows",
    "peft": "no LoRA rows",
    "trl": "no rows beside TRL",
    "datasets": "no rows beside TRL",
    "bitsandbytes": "no 8-bit Adam",
    "liger-kernel": "no rows of liger's head and layers; TRL runs without its layers",
    "flash-attn": "no flash_attn rows; torch_varlen takes its place",
}
COMPILES = {"flash-attn"}  # for an hour and more
HOW = """\
    pip install {names}

On a machine without a network, carry their wheels: where there is one, with the same version of Python,

    pip wheel --no-deps --wheel-dir wheels {names}

then, with that folder beside you:

    pip install --no-index --no-deps --find-links wheels {names}
"""


def version_of(package: str) -> str | None:
    """Its version, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements_of(package: str) -> list[str]:
    """Names that an installed package always requires."""
    stated = metadata.requires(package) or []
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in stated if ";" not in text]


def missing(
    *,
    version: Callable[[str], str | None] = version_of,
    requirements: Callable[[str], list[str]] = requirements_of,
) -> tuple[list[str], list[str]]:
    """What nothing runs without, and what only some rows need; neither is installed.

    What an installed deepspeed requires is needed: transformers imports it wherever it sees it.
    """

    def absent(names: Iterable[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if version(name) is None]

    there = [name for name in OPTIONAL if version(name) is not None]
    needed = absent([*NEEDED, *(requirements("deepspeed") if "deepspeed" in there else [])])
    wanted = absent([*OPTIONAL, *(name for package in there for name in requirements(package))])
    return needed, [name for name in wanted if name not in needed]


def explain(needed: list[str], optional: list[str]) -> str:
    """What to say about missing packages."""
    lines = [f"benchmarks.gpu can't start without: {', '.join(needed)}"] if needed else []
    lines += [f"not installed: {name} ({OPTIONAL.get(name, 'others require it')})" for name in optional]
    brought = [name for name in (*needed, *optional) if name not in COMPILES]
    return "\n".join([*lines, "", how_to_bring(brought)] if brought else lines)


def how_to_bring(names: list[str]) -> str:
    """Commands for machines with and without a network."""
    return HOW.format(names=" ".join(names))


def check_packages() -> None:
    """Say once what is missing.

    Raises:
        SystemExit: something is missing that nothing runs without.
    """
    needed, optional = missing()
    if needed:
        raise SystemExit(explain(needed, optional))
    if optional:
        print(explain([], optional))
