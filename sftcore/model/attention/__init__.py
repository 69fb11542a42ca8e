"""Attention over packed documents: four backends with one signature, chosen by ability.

In: a model's configuration, dtype and device, and a request (`auto` or a name). Out: the name of a registered
transformers attention.
Invariant: what a model needs and a backend can't do is refused by name, never approximated.
Trade-off: backends see documents, not masks, so no (T, T) mask exists anywhere: at T = 16,384 that mask
alone would be 256 MB as booleans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from sftcore.errors import Problem, UserInputError
from sftcore.model.attention import flash, flex, sdpa_docs, torch_varlen
from sftcore.model.attention.needs import AttentionNeeds, needs_of

log = logging.getLogger(__name__)
Lacks = Callable[[AttentionNeeds], list[str]]
BACKENDS: dict[str, tuple[Callable[..., Any], Lacks]] = {  # in the order of preference
    flash.NAME: (flash.flash_attention, flash.lacks),
    torch_varlen.NAME: (torch_varlen.torch_varlen_attention, torch_varlen.lacks),
    flex.NAME: (flex.flex_docs_attention, flex.lacks),
    sdpa_docs.NAME: (sdpa_docs.sdpa_docs_attention, sdpa_docs.lacks),
}
REGISTERED = {  # names with "flash", "sdpa", "flex_attention" or "paged" mean something to transformers
    flash.NAME: "sftcore_packed_fa",
    torch_varlen.NAME: "sftcore_packed_varlen",
    flex.NAME: "sftcore_packed_blocks",
    sdpa_docs.NAME: "sftcore_packed_documents",
}


def choose_attention(config: Any, wanted: str, *, dtype: str, device: str) -> str:
    """Name of the attention implementation to load a model with, registered with transformers.

    Args:
        config: the model's configuration.
        wanted: `auto` or a name in BACKENDS.
        dtype: "bfloat16" or "float32".
        device: "cuda" or "cpu".

    Raises:
        UserInputError: no backend, or not the requested one, can do what the model needs.
    """
    needs = needs_of(config, dtype=dtype, device=device)
    names = list(BACKENDS) if wanted == "auto" else [wanted]
    refusals = {name: BACKENDS[name][1](needs) for name in names}
    able = [name for name in names if not refusals[name]]
    if not able:
        raise UserInputError(
            Problem(
                what=f"attention of model type {config.model_type!r} can't be computed",
                where="model.attention",
                got=wanted,
                allowed="; ".join(f"{name}: {', '.join(why)}" for name, why in refusals.items()),
                remedy="set model.attention: auto, or train another model" if wanted != "auto" else "",
            )
        )
    log.info("attention backend: %s", able[0])
    for name, why in refusals.items():
        if why and wanted == "auto":
            log.debug("not %s: %s", name, ", ".join(why))
    name = REGISTERED[able[0]]
    AttentionInterface.register(name, BACKENDS[able[0]][0])
    AttentionMaskInterface.register(name, _no_mask)
    return name


PLAIN = AttentionNeeds(head_size=64, value_size=64, dtype="bfloat16", device="cuda")
ABILITIES = {
    "CPUs": replace(PLAIN, device="cpu"),
    "float32": replace(PLAIN, dtype="float32"),
    "heads above 256": replace(PLAIN, head_size=512, value_size=512),
    "values unlike keys": replace(PLAIN, head_size=192, value_size=128),
    "soft caps": replace(PLAIN, softcap=50.0),
    "sinks": replace(PLAIN, sinks=True),
}


def ability_table() -> str:
    """What each backend can do beyond bfloat16 on GPUs, as Markdown, in the order of preference."""
    lines = ["| attention | " + " | ".join(ABILITIES) + " |", "|---" * (1 + len(ABILITIES)) + "|"]
    for name, (_, lacks) in BACKENDS.items():
        always = set(lacks(PLAIN))  # that it is not installed here, say
        cells = ["no" if set(lacks(needs)) - always else "yes" for needs in ABILITIES.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _no_mask(*_: object, **__: object) -> torch.Tensor | None:
    """Backends take document borders instead of a mask."""
    return None
