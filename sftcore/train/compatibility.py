"""What goes together: adapter kind x DeepSpeed configuration, as data; a page's table and a guard.

In: a recipe's adapter kind, optimizer, DeepSpeed configuration. Out: nothing, or a refusal with the reason.
Invariant: each cell that says "runs" is trained by `tests/train/test_cells.py`, with two ranks and with one
process, with and without activation checkpointing; each that is refused is shown to fail without the guard.
Trade-off: rows are what a configuration asks for, not file names, so a user's own JSON is judged as well;
32 tiny runs by two ranks cost a minute of test time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.train.ds_config import zero_stage

KINDS = ("none", "lora", "qlora")
KIND_NAMES = {"none": "full", "lora": "LoRA", "qlora": "QLoRA"}
RUNS = "runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that a configuration needs of the machine.

    Args:
        what: the need.
        without: what DeepSpeed 0.19.8 does where it is missing.
        remedy: what to do then.
    """

    what: str
    without: str
    remedy: str


CUDA = Need(
    what="ZeRO++'s quantised collectives are CUDA kernels",
    without="ValueError: This op had not been implemented on CPU backend.",
    remedy="take deepspeed: zero3, or train on GPUs",
)
ASYNC_IO = Need(
    what="offload to NVMe needs libaio and DeepSpeed's async_io operation",
    without="RuntimeError: Unable to JIT load the async_io op",
    remedy="install libaio-dev, or take deepspeed: zero3-offload",
)
ROWS: dict[str, Need | None] = {  # name in ds_configs/ -> what it needs beyond what CI has
    "zero0": None,
    "zero1": None,
    "zero2": None,
    "zero3": None,
    "zero2-offload": None,
    "zero3-offload": None,
    "zero3-nvme": ASYNC_IO,
    "zeropp": CUDA,
}

MUON_IS_WHOLE = (
    Problem(  # at stage 1 one rank's losses differ in the 4th digit, two ranks didn't end in 8 minutes
        what="DeepSpeed 0.19.8's Muon trains otherwise where ZeRO shards its state, and two ranks hang",
        where="train.optimizer",
        got="muon",
        remedy="set deepspeed: zero0, or train.optimizer: adamw",
    )
)


def need_of(ds_config: dict[str, Any]) -> Need | None:
    """What a DeepSpeed configuration needs of the machine, or None."""
    zero = ds_config.get("zero_optimization", {})
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        return CUDA
    devices = [zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")]
    return ASYNC_IO if "nvme" in devices else None


def check_combination(
    ds_config: dict[str, Any], optimizer: str, *, has_cuda: bool, has_async_io: bool
) -> None:
    """Refuse a configuration that DeepSpeed can't run with this optimizer, or on such a machine.

    Raises:
        MissingEnvironmentError: it needs CUDA or asynchronous file access.
        UserInputError: Muon with sharded state.
    """
    if optimizer == "muon" and zero_stage(ds_config) > 0:
        raise UserInputError(MUON_IS_WHOLE)
    check_machine(ds_config, has_cuda=has_cuda, has_async_io=has_async_io)


def check_machine(ds_config: dict[str, Any], *, has_cuda: bool, has_async_io: bool) -> None:
    """Refuse a configuration that this machine can't run.

    Raises:
        MissingEnvironmentError: with what is missing and the remedy.
    """
    need = need_of(ds_config)
    if need is None or {CUDA: has_cuda, ASYNC_IO: has_async_io}[need]:
        return
    raise MissingEnvironmentError(Problem(what=need.what, where="deepspeed", remedy=need.remedy))


def cells() -> list[tuple[str, str]]:
    """(adapter kind, configuration name) of every cell that runs wherever torch does."""
    return [(kind, name) for name, need in ROWS.items() if need is None for kind in KINDS]


def table() -> str:
    """The matrix as Markdown, for docs/running.md."""
    lines = ["| deepspeed | " + " | ".join(KIND_NAMES[kind] for kind in KINDS) + " |", "|---" * 4 + "|"]
    for name, need in ROWS.items():
        cell = RUNS if need is None else f"{need.what}; refused elsewhere"
        lines.append(f"| `{name}` | " + " | ".join([cell] * len(KINDS)) + " |")
    return "\n".join(lines)
