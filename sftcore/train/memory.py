"""Memory: a recipe -> predicted bytes on each rank, by component; out of memory -> what would help most.

In: a recipe, a world size, the plan's largest pack. Out: bytes by component; a message with three remedies.
Invariant: what the plan predicts and what the message recommends come from the same numbers.
Trade-off: activations are counted on the meta device (what autograd keeps of 64 tokens, times the pack), not
measured: exact for saved tensors, blind to a kernel's scratch space.
"""

from __future__ import annotations

import numpy as np

from sftcore import dist
from sftcore.amounts import counted, size
from sftcore.batching.schedule import Schedule
from sftcore.config import Recipe
from sftcore.errors import Problem, TrainingFailed
from sftcore.model.cost import ModelCost, measure_recipe
from sftcore.precision import torch_dtype
from sftcore.recipe import deepspeed_file
from sftcore.train.devices import Device, device_here
from sftcore.train.ds_config import autocasts, read_ds_config, zero_stage
from sftcore.train.outcome import PackTooLarge

NUM_REMEDIES = 3
# Of a rank on CPUs: 0.5 GB of libraries, kernels' scratch space, freed memory that nothing fits into, and the
# tokenizer. benchmarks/memory.py's ten cases come out at -14 to +9 % with it.
PROCESS_BYTES, PROCESS_BYTES_PER_WORD = 960_000_000, 1_450
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default
LIVE_ELEMENTS = 1_000_000_000  # of gathered weights, at stage 3; likewise
BUCKET_BYTES = 6  # of a gradient on its way: float32 until it is reduced, and a copy in the bucket's type
Bytes = dict[str, int]


def predict_bytes(
    recipe: Recipe, *, world: int, num_tokens: int, device: Device, cost: ModelCost | None = None
) -> Bytes:
    """Bytes on each rank's device by component, while a pack of `num_tokens` is trained.

    Components: weights, gradients, optimizer (states by ZeRO stage), activations (kept for backward), head
    (a chunk of logits and the projection's gradient), buckets (gradients that wait to be reduced), gathered
    (weights of other ranks, or of the host, at stage 3), update (the gradients' flat copy, beyond what
    backward has freed by then), process (on CPUs: everything else).

    Args:
        cost: of the recipe's model, if it was measured already.
    """
    ds_config = read_ds_config(deepspeed_file(recipe))
    zero, stage = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    cost = cost or measure_recipe(recipe)
    weight_bytes = _weight_bytes(recipe)
    moved = offloaded(recipe, device)
    states = _states(recipe, world=world, cost=cost)
    states |= dict.fromkeys(moved, 0)
    has_sums = stage == 1 and not autocasts(
        ds_config, recipe
    )  # float32 sums, which the update reads as they are
    calls_products = stage == 3 or autocasts(ds_config, recipe) or recipe.adapter.kind == "qlora"
    is_recomputed = recipe.train.activation_checkpointing == "full"
    backward = {
        "activations": cost.activation_bytes(
            num_tokens, is_recomputed=is_recomputed, calls_products=calls_products
        ),
        "head": cost.head_bytes(num_tokens, is_summed=has_sums and recipe.model.head != "liger"),
    }
    largest = cost.num_words * cost.hidden_size if cost.trains_all else 0  # never cut
    bucket = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    is_allocated = device.is_gpu and stage >= 2  # on CPUs only what is touched counts
    waiting = max(largest, bucket if is_allocated else min(cost.num_trained_parameters, bucket))
    process = PROCESS_BYTES + PROCESS_BYTES_PER_WORD * cost.num_words
    live = min(cost.num_parameters, int(zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)))
    has_flat_copy = stage > 0 and not has_sums and "optimizer" not in moved
    flat = 4 * cost.num_trained_parameters // world if has_flat_copy else 0
    return {
        **states,
        **backward,
        "buckets": BUCKET_BYTES * waiting if world > 1 or stage >= 2 else 0,
        "gathered": weight_bytes * live if stage == 3 and (world > 1 or "weights" in moved) else 0,
        "update": max(0, flat - sum(backward.values())),
        "process": 0 if device.is_gpu else process,
    }


def predict_host_bytes(recipe: Recipe, *, world: int, device: Device, cost: ModelCost | None = None) -> int:
    """Bytes that each rank keeps in host memory (or on NVMe) instead of its GPU's; 0 without offload."""
    states = _states(recipe, world=world, cost=cost or measure_recipe(recipe))
    return sum(states[part] for part in offloaded(recipe, device))


def offloaded(recipe: Recipe, device: Device) -> list[str]:
    """Components that live in host memory instead of a GPU's; none without a GPU."""
    if not device.is_gpu:
        return []
    zero = read_ds_config(deepspeed_file(recipe)).get("zero_optimization", {})
    keys = {"offload_optimizer": ["optimizer", "gradients"], "offload_param": ["weights"]}
    return [part for key, parts in keys.items() if zero.get(key) for part in parts]


def _states(recipe: Recipe, *, world: int, cost: ModelCost) -> Bytes:
    """Weights, gradients and optimizer state of a rank, wherever they live."""
    ds_config = read_ds_config(deepspeed_file(recipe))
    states = cost.state_bytes_per_rank(
        stage=zero_stage(ds_config),
        world=world,
        weight_bytes=_weight_bytes(recipe),
        quantised=recipe.adapter.kind == "qlora",
        optimizer=recipe.train.optimizer,
        frozen_bytes=torch_dtype(recipe.model).itemsize,  # autocast leaves them as they are
    )
    # ZeRO++ keeps a second copy of the weights, cut up over the GPUs of a node (arXiv 2306.10209)
    copies = int(ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    if copies > 1:
        states["weights"] += cost.num_parameters * _weight_bytes(recipe) // min(copies, world)
    return states


def _weight_bytes(recipe: Recipe) -> int:
    is_autocast = autocasts(read_ds_config(deepspeed_file(recipe)), recipe)
    return 4 if is_autocast else torch_dtype(recipe.model).itemsize


def explain_out_of_memory(error: PackTooLarge, recipe: Recipe, schedule: Schedule) -> TrainingFailed:
    """One message: what was being computed, how much was in use, what would save most."""
    pack = error.pack
    num_tokens = int(schedule.lengths[pack].sum())
    num_trained = int(schedule.num_trained[pack].sum())
    longest = int(np.max(schedule.lengths[pack]))
    remedies = rank_remedies(
        recipe, world=schedule.world, num_tokens=num_tokens, longest=longest, device=device_here()
    )
    return TrainingFailed(
        Problem(
            what=f"out of memory in step {error.step}: {str(error).strip().splitlines()[0][:160]}",
            got=f"a pack of {counted(num_tokens, 'token')}, {num_trained:,} of them trained, "
            f"in {counted(len(pack), 'document')}; peak {size(dist.peak_memory_bytes())} on this rank",
            remedy="; or ".join(f"{setting} (saves about {size(saved)})" for setting, saved in remedies),
        )
    )


def rank_remedies(
    recipe: Recipe, *, world: int, num_tokens: int, longest: int, device: Device
) -> list[tuple[str, int]]:
    """(setting, predicted bytes saved) of the settings that save most, most expensive first.

    Args:
        longest: tokens of the longest sample, below which the capacity can't go.
    """

    def total(changed: Recipe) -> int:
        fewer = min(num_tokens, changed.batch.capacity)
        return sum(predict_bytes(changed, world=world, num_tokens=fewer, device=device).values())

    before = total(recipe)
    changes = [*lighter_recipes(recipe, longest=longest), *_sharded_recipes(recipe, world, device)]
    saved = [(setting, before - total(changed)) for setting, changed in changes]
    ranked = sorted(saved, key=lambda item: -item[1])
    return [(setting, size) for setting, size in ranked if size > 0][:NUM_REMEDIES]


def lighter_recipes(recipe: Recipe, *, longest: int) -> list[tuple[str, Recipe]]:
    """Settings that save memory wherever the recipe runs, each with the recipe that has it."""

    def changed(section: str, **values: object) -> Recipe:
        settings = getattr(recipe, section).model_copy(update=values)
        return recipe.model_copy(update={section: settings})

    found = []
    capacity = max(longest, recipe.batch.capacity // 2)
    if capacity < recipe.batch.capacity:
        found.append((f"batch.capacity: {capacity}", changed("batch", capacity=capacity)))
    if recipe.train.activation_checkpointing == "none":
        recomputed = changed("train", activation_checkpointing="full")
        found.append(("train.activation_checkpointing: full", recomputed))
    if recipe.adapter.kind == "none" and recipe.train.optimizer == "adamw":
        found.append(("train.optimizer: adamw-8bit", changed("train", optimizer="adamw-8bit")))
    if recipe.architecture == "encoder":
        return found  # it takes no adapter
    if recipe.adapter.kind == "none":
        found.append(("adapter.kind: lora", changed("adapter", kind="lora")))
    if recipe.adapter.kind != "qlora":
        found.append(("adapter.kind: qlora", changed("adapter", kind="qlora")))
    return found


def _sharded_recipes(recipe: Recipe, world: int, device: Device) -> list[tuple[str, Recipe]]:
    """DeepSpeed configurations that keep less on each device, each with the recipe that has it."""
    names = []
    stage = zero_stage(read_ds_config(deepspeed_file(recipe)))
    if stage < 3 and world > 1:
        names.append("zero3")
    if device.is_gpu and not offloaded(recipe, device):
        names.append("zero3-offload" if stage == 3 else "zero2-offload")
    return [(f"deepspeed: {name}", recipe.model_copy(update={"deepspeed": name})) for name in names]
