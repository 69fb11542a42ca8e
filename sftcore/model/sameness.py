"""Whether two forms of a model are the same function: the logits of a few tokens, compared.

In: models. Out: logits; how far they are apart.
Invariant: what is judged is what plain transformers computes, with the model's own attention and head.
Trade-off: one document of 12 tokens (1 s for 135M parameters on two cores, with the load). In bfloat16
rounding throws single tokens far off, so the middle one is judged, and after routers, which may choose
another expert for a token, the one that differs least; weights are compared by digests elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sftcore.model.quantise import keep_trainable_layout

NUM_TOKENS = 12
TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # relative to the largest value
ROUTERS = frozenset({"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"})
MARGIN = 1.5  # times the weights: what a load needs next to them
MEMORY_FILE = Path("/proc/meminfo")
GROUP_FILE, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.current", "inactive_file")  # docs.kernel.org/admin-guide/cgroup-v2.html
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def probe_tokens(config: Any) -> torch.Tensor:
    """(NUM_TOKENS,) token ids without the pad's: a classifier would take that for the document's end."""
    text = config.get_text_config()
    pad = text.to_dict().get("pad_token_id")
    ids = torch.arange(1, NUM_TOKENS + 1) * 7 % text.vocab_size
    return ids if pad is None else torch.where(ids == pad, (ids + 1) % text.vocab_size, ids)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Float32 logits of one document on the CPU.

    Args:
        arguments: more of what the model's forward takes; for packs, where its attention asks for it.
    """
    was_training = model.training
    model.eval()
    keep_trainable_layout(model.modules())
    device = model.device
    plain = {"input_ids": ids.to(device)[None], "attention_mask": None, "use_cache": False}
    positions = torch.arange(len(ids), device=device)[None]
    logits = model(**{**plain, "position_ids": positions, **arguments}).logits
    model.train(was_training)
    return logits.float().cpu()


def distance(found: torch.Tensor, wanted: torch.Tensor, *, dtype: torch.dtype, config: Any) -> float:
    """How far logits are apart, as a share of the largest, of the token by which a dtype is judged."""
    off = (found - wanted).abs().amax(-1).flatten() / wanted.abs().max().clamp(min=1e-6)
    is_routed = not ROUTERS.isdisjoint(config.get_text_config().to_dict())
    if dtype == torch.float32:
        return float(off.max())
    return float(off.min() if is_routed else off.median())


def is_same(share: float, dtype: torch.dtype) -> bool:
    """Whether a distance is rounding (what is not a number is not)."""
    return share < TOLERANCES[dtype]


def has_room_for(num_bytes: int) -> bool:
    """Whether this process may take memory for a model of so many bytes, without swapping."""
    lines = MEMORY_FILE.read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return num_bytes * MARGIN < min([available, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group around this process has left (Slurm's --mem, containers), if there are any.

    Pages of files that were read count as left: the kernel drops them first.
    """
    if not GROUP_FILE.is_file():
        return []
    left = []
    for line in GROUP_FILE.read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = GROUPS / kinds
        limit, used, dropped = V1 if kinds else V2
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            numbers = [_number_in(folder / limit), _number_in(folder / used)]
            if None not in numbers:
                stat = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                cached = sum(int(row.split()[1]) for row in stat if row.startswith(f"{dropped} "))
                left.append(int(numbers[0] or 0) - int(numbers[1] or 0) + cached)
    return left


def _number_in(file: Path) -> int | None:
    """The number that a file holds; None if there is no such file, or no limit."""
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
    return None if text == "max" else int(text)
