"""`sftcore plan`: what a run will do and what it needs, before any GPU is touched.

In: a recipe and a number of ranks. Out: RUN/plan.json and a table.
Invariant: the plan shown is the plan run: both come from the same `Schedule`.
Trade-off: of a run of more than 5,000 steps, packs and imbalance are those of 5,000 steps at even distances
(a millisecond each), and said to be; samples, tokens and FLOPs are counted in full.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sftcore.amounts import counted, size, work
from sftcore.batching.dealing import IDLE
from sftcore.batching.schedule import Schedule, Step
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.model.cost import measure_recipe
from sftcore.precision import dtype_of
from sftcore.train.devices import Device
from sftcore.train.memory import predict_bytes

MAX_STEPS_LISTED = 1000
MAX_STEPS_DEALT = 5000


def describe_plan(recipe: Recipe, store: TokenStore, schedule: Schedule, device: Device) -> dict[str, Any]:
    """The content of plan.json: totals, predictions for `device`, and the first `MAX_STEPS_LISTED` steps."""
    cost = measure_recipe(recipe)
    largest = int(schedule.lengths[schedule.largest_pack].sum())
    return {
        "fingerprint": schedule.fingerprint,
        "store": store.fingerprint,
        "world": schedule.world,
        "totals": {
            "num_steps": schedule.num_steps,
            "epochs": schedule.epochs,
            "num_samples": schedule.num_samples,
            **_count_tokens(schedule),
            **_deal_steps(schedule),
            "num_pad_tokens": 0,
            "largest_pack_tokens": largest,
            "longest_sample_tokens": int(schedule.lengths.max()),
        },
        "sources": _describe_sources(store, schedule),
        "predictions": {
            "num_parameters": cost.num_parameters,
            "num_trained_parameters": cost.num_trained_parameters,
            "dtype": dtype_of(recipe.model),
            "device": device.name,
            "bytes_per_rank": predict_bytes(
                recipe, world=schedule.world, num_tokens=largest, device=device, cost=cost
            ),
        },
        "steps": [
            _describe_step(schedule, schedule.step(number))
            for number in range(min(schedule.num_steps, MAX_STEPS_LISTED))
        ],
    }


def _count_tokens(schedule: Schedule) -> dict[str, Any]:
    """Over all epochs; exact, without looking at steps."""
    samples = [(schedule.epoch_samples(epoch), count) for epoch, count in schedule.distinct_epochs]
    return {
        "num_tokens": sum(count * int(schedule.lengths[s].sum()) for s, count in samples),
        "num_trained_tokens": sum(count * int(schedule.num_trained[s].sum()) for s, count in samples),
        "flops": sum(count * schedule.pack_cost(s) for s, count in samples),
    }


def _deal_steps(schedule: Schedule) -> dict[str, Any]:
    """How full packs are and how even ranks, from every step or from `MAX_STEPS_DEALT` of them."""
    num_dealt = min(schedule.num_steps, MAX_STEPS_DEALT)
    numbers = np.linspace(0, schedule.num_steps - 1, num_dealt).round().astype(int).tolist()
    num_packs, num_tokens, slowest, mean = 0, 0, 0.0, 0.0
    for step in map(schedule.step, numbers):
        loads = _rank_costs(schedule, step)
        num_packs += len(step.packs)
        num_tokens += step.num_tokens
        slowest += max(loads)
        mean += sum(loads) / len(loads)
    return {
        "num_packs": round(num_packs * schedule.num_steps / num_dealt),
        "utilisation": num_tokens / (num_packs * schedule.capacity),
        "imbalance": slowest / mean - 1,
        "num_steps_dealt": num_dealt,
    }


def _describe_sources(store: TokenStore, schedule: Schedule) -> list[dict[str, Any]]:
    """What each training source has, and what the run uses of it."""
    sources = store.manifest["sources"]
    used = np.zeros((3, len(sources)))  # samples, tokens, trained tokens
    for epoch, count in schedule.distinct_epochs:
        samples = schedule.epoch_samples(epoch)
        of = schedule.sources[samples]
        for row, each in zip(used, (None, schedule.lengths, schedule.num_trained), strict=True):
            weights = None if each is None else each[samples]
            row += count * np.bincount(of, weights=weights, minlength=len(sources))
    return [
        {
            "name": source["name"],
            "num_samples_in_store": source["num_samples"],
            "num_samples": int(num_samples),
            "num_tokens": int(num_tokens),
            "num_trained_tokens": int(num_trained),
        }
        for source, (num_samples, num_tokens, num_trained) in zip(sources, used.T, strict=True)
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
    total = sum(memory.values())
    share = t["num_trained_tokens"] / t["num_tokens"]
    dealt = t["num_steps_dealt"]
    about = "" if dealt == t["num_steps"] else f"; packs and imbalance as in {dealt:,} of the steps"
    samples, largest = counted(t["num_samples"], "sample"), counted(t["largest_pack_tokens"], "token")
    lines = [
        ("steps", f"{t['num_steps']:,} over {counted(t['epochs'], 'epoch')} of {samples}{about}"),
        ("packs", f"{t['num_packs']:,} on {counted(plan['world'], 'rank')}, largest {largest}"),
        ("tokens", f"{t['num_tokens']:,}, no pads"),
        (
            "trained tokens",
            f"{t['num_trained_tokens']:,} = {share:.1%} of the tokens; only these meet the head",
        ),
        ("utilisation", f"{t['utilisation']:.1%} of packs x capacity"),
        ("imbalance", f"{t['imbalance']:.1%} = sum of slowest rank / sum of mean rank - 1, predicted"),
        ("compute", f"{work(t['flops'])}, forward and backward"),
        ("model", f"{p['num_parameters']:,} parameters in {p['dtype']}"),
        (
            "memory per rank",
            " + ".join(f"{name} {size(part, against=total)}" for name, part in memory.items())
            + f" = {size(total, against=total)}",
        ),
    ]
    for source in plan["sources"] if len(plan["sources"]) > 1 else []:
        text = (
            f"{counted(source['num_samples'], 'sample')} of {source['num_samples_in_store']:,} in the store"
        )
        lines.append((f"  {source['name']}", f"{text}, {counted(source['num_tokens'], 'token')}"))
    return "\n".join(f"{name:<16}{text}" for name, text in lines)
