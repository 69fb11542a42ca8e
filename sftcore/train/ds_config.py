"""DeepSpeed configuration: a literal JSON file plus what the recipe decides.

In: a file of ds_configs/ (or the user's own) and the recipe. Out: the dictionary that deepspeed.initialize
takes.
Invariant: batch sizes, clipping, precision and optimizer come from the recipe alone; a file that sets them
is refused.
Trade-off: we keep our own list of DeepSpeed's top-level keys, because DeepSpeed 0.19.8 accepts a misspelt
one in silence (`zero_optimisation` trains at stage 0); a key newer than the list must be added here.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.display import shown_value
from sftcore.errors import Problem, UserInputError
from sftcore.precision import dtype_of

# https://www.deepspeed.ai/docs/config-json/, and deepspeed/runtime/constants.py of 0.19.8
ALLOWED_KEYS = frozenset(
    """zero_optimization communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients
    comms_logger flops_profiler wall_clock_breakdown memory_breakdown dump_state aio activation_checkpointing
    checkpoint compile sequence_parallel_size hybrid_engine zero_force_ds_cpu_optimizer
    zero_allow_untested_optimizer timers seq_parallel_communication_data_type""".split()
)
OWNED_KEYS = {  # key -> where the recipe sets it
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "managed_gradient_accumulation": "batch",
    "gradient_allreduce_op": "train.normalise",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.scheduler",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "steps_per_print": "tracking",
}


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON file.

    Raises:
        UserInputError: not JSON, an unknown key (with the nearest valid one), or a key that the recipe owns.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserInputError(Problem(what=f"can't read as JSON: {error}", where=str(path))) from error
    if not isinstance(config, dict):
        raise UserInputError(Problem(what="a DeepSpeed configuration is a JSON object", where=str(path)))
    problems = [problem for key in config if (problem := _check_key(key, path))]
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if type(stage) is not int or not 0 <= stage <= 3:
        got, where = shown_value(stage), f"{path}: zero_optimization.stage"
        problems.append(Problem(what="no ZeRO stage", where=where, got=got, allowed="0, 1, 2, 3"))
    if problems:
        raise UserInputError(*problems)
    return config


def _check_key(key: str, path: Path) -> Problem | None:
    where = f"{path}: {key}"
    if key in OWNED_KEYS:
        return Problem(what="set by the recipe, not here", where=where, remedy=f"use {OWNED_KEYS[key]}")
    if key not in ALLOWED_KEYS:
        near = difflib.get_close_matches(key, sorted(ALLOWED_KEYS), n=1)
        return Problem(what="unknown key", where=where, remedy=f"did you mean {near[0]!r}?" if near else "")
    return None


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for; 0 without one."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def complete_ds_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Add what the recipe decides.

    Batches: each micro-batch is one pack, and our loop owns the accumulation boundary, since the number of
    packs differs between steps. Precision: see `autocasts`; else bfloat16 weights get float32 masters and
    float32 gradient accumulation.
    """
    complete = {
        **config,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # its clock, on by default, has the host wait for the device at both ends of every step
        "timers": {"throughput": {"enabled": False}, **config.get("timers", {})},
    }
    stage = zero_stage(config)
    # DeepSpeed's default is 1.0. Stage 0 is clipped by our optimizer hook, which also measures the norm.
    complete["gradient_clipping"] = recipe.train.max_grad_norm if stage else 0.0
    if dtype_of(recipe.model) == "bfloat16" and not autocasts(config, recipe):
        # each gradient goes into the float32 sum as backward makes it: 2 bytes a weight less at ZeRO-1
        complete["bf16"] = {"enabled": True, "immediate_grad_update": True}
        complete["data_types"] = {"grad_accum_dtype": "fp32"}
    return complete


def autocasts(config: dict[str, Any], recipe: Recipe) -> bool:
    """Whether bfloat16 is done by float32 weights under autocast.

    ZeRO-0 in DeepSpeed 0.19.8 refuses float32 accumulation of bfloat16 gradients, so there the weights
    themselves are the float32 masters.
    """
    return dtype_of(recipe.model) == "bfloat16" and zero_stage(config) == 0
