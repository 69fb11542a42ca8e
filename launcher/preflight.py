"""`sftcore plan`: what a run will do and what it needs, before any GPU is touched.

In: a recipe and a number of ranks. Out: RUN/plan.json and a table.
Invariant: the plan shown is the plan run: both come from the same `Schedule`.
Trade-off: totals walk over every step of the run (10 us a pack), so a plan of a million packs takes 10 s.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sftcore.batching.schedule import IDLE, Schedule, Step
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.model.cost import measure_recipe
from sftcore.train.devices import Device
from sftcore.train.memory import predict_bytes

MAX_STEPS_LISTED = 1000


def describe_plan(recipe: Recipe, store: TokenStore, schedule: Schedule, device: Device) -> dict[str, Any]:
    """The content of plan.json: totals, predictions for `device`, and the first `MAX_STEPS_LISTED` steps."""
    cost = measure_recipe(recipe)
    steps = [schedule.step(number) for number in range(schedule.num_steps)]
    loads = np.array([_rank_costs(schedule, step) for step in steps])  # (steps, world) predicted FLOPs
    num_packs = sum(len(step.packs) for step in steps)
    num_tokens = sum(step.num_tokens for step in steps)
    largest = max(int(schedule.lengths[p].sum()) for step in steps for p in step.packs)
    return {
        "fingerprint": schedule.fingerprint,
        "store": store.fingerprint,
        "world": schedule.world,
        "totals": {
            "num_steps": schedule.num_steps,
            "epochs": schedule.epochs,
            "num_samples": schedule.num_samples,
            "num_packs": num_packs,
            "num_tokens": num_tokens,
            "num_trained_tokens": sum(step.num_trained_tokens for step in steps),
            "num_pad_tokens": 0,
            "utilisation": num_tokens / (num_packs * schedule.capacity),
            "imbalance": float(loads.max(1).sum() / loads.mean(1).sum() - 1),
            "flops": float(loads.sum()),
            "largest_pack_tokens": largest,
            "longest_sample_tokens": int(schedule.lengths.max()),
        },
        "sources": _describe_sources(store, schedule, steps),
        "predictions": {
            "num_parameters": cost.num_parameters,
            "num_trained_parameters": cost.num_trained_parameters,
            "device": device.name,
            "bytes_per_rank": predict_bytes(
                recipe, world=schedule.world, num_tokens=largest, device=device, cost=cost
            ),
        },
        "steps": [_describe_step(schedule, step) for step in steps[:MAX_STEPS_LISTED]],
    }


def _describe_sources(store: TokenStore, schedule: Schedule, steps: list[Step]) -> list[dict[str, Any]]:
    """What each training source has, and what the run uses of it."""
    samples = np.concatenate([step.samples for step in steps])
    of = schedule.sources[samples]
    return [
        {
            "name": source["name"],
            "num_samples_in_store": source["num_samples"],
            "num_samples": int((of == number).sum()),
            "num_tokens": int(schedule.lengths[samples[of == number]].sum()),
            "num_trained_tokens": int(schedule.num_trained[samples[of == number]].sum()),
        }
        for number, source in enumerate(store.manifest["sources"])
    ]


def _rank_costs(schedule: Schedule, step: Step) -> list[float]:
    """Predicted FLOPs of each rank in a step."""
    costs = [schedule.pack_cost(pack) for pack in step.packs]
    return [sum(costs[p] for p in row if p != IDLE) for row in schedule.deal(step)]


def _describe_step(schedule: Schedule, step: Step) -> dict[str, Any]:
    return {
        "step": step.number + 1,
        "epoch": step.epoch,
        "num_samples": step.num_samples,
        "num_packs": len(step.packs),
        "num_tokens": step.num_tokens,
        "num_trained_tokens": step.num_trained_tokens,
        "num_micro_batches": schedule.deal(step).shape[1],
    }


def plan_table(plan: dict[str, Any]) -> str:
    """The plan's totals as lines for a terminal, each derived number with its arithmetic."""
    t, p = plan["totals"], plan["predictions"]
    memory = p["bytes_per_rank"]
    share = t["num_trained_tokens"] / t["num_tokens"]
    lines = [
        ("steps", f"{t['num_steps']} over {t['epochs']} epoch(s) of {t['num_samples']} samples"),
        ("packs", f"{t['num_packs']} on {plan['world']} rank(s), largest {t['largest_pack_tokens']} tokens"),
        ("tokens", f"{t['num_tokens']:,}, no pads"),
        (
            "trained tokens",
            f"{t['num_trained_tokens']:,} = {share:.1%} of the tokens; only these meet the head",
        ),
        ("utilisation", f"{t['utilisation']:.1%} of packs x capacity"),
        ("imbalance", f"{t['imbalance']:.1%} = sum of slowest rank / sum of mean rank - 1, predicted"),
        ("compute", f"{t['flops']:.3g} FLOPs, forward and backward"),
        ("model", f"{p['num_parameters']:,} parameters"),
        (
            "memory per rank",
            " + ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
            + f" = {sum(memory.values()) / 1e9:.2f} GB",
        ),
    ]
    for source in plan["sources"] if len(plan["sources"]) > 1 else []:
        text = f"{source['num_samples']:,} samples of {source['num_samples_in_store']:,} in the store"
        lines.append((f"  {source['name']}", f"{text}, {source['num_tokens']:,} tokens"))
    return "\n".join(f"{name:<16}{text}" for name, text in lines)
