"""How evenly the schedule's dealing loads the ranks, simulated on integers.

    python -m benchmarks.balance --lengths LENGTHS.npy --out benchmarks/results

Imbalance = (sum over steps of the slowest rank) / (sum over steps of the mean rank) - 1: the share of time
that the average rank waits. Costs are FLOPs of a 1B model (Llama-3.2-1B's shape), whose head and attention
weigh most. `step`: ranks wait for each other once a step (ZeRO 0 to 1); `micro-batch`: in every micro-batch
(ZeRO 2 and 3). `dealt`: our dealing; `random`: the same packs in random order. Cells of full packs
(`batch.tokens_per_step`) come with all world sizes and capacities, cells of steps of so many samples
(`batch.samples_per_step`, whose packs the schedule itself cuts) with 8,192 tokens. Writes OUT/balance.json
and balance.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import versions
from sftcore.batching.dealing import IDLE, deal
from sftcore.batching.packing import pack
from sftcore.batching.schedule import CostCoefficients, Schedule

# Llama-3.2-1B: 973 M body parameters, 16 layers, 32 heads of 64, vocabulary 128,256, hidden size 2,048
PER_TOKEN, PER_SQUARE, PER_TRAINED = 6 * 973e6, 6 * 16 * 2048, 6 * 2048 * 128_256
WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024)
CAPACITIES = (4096, 8192, 32_768, 131_072)
PACKS_PER_RANK = 4  # in a step; the goal's cell (8 ranks, 8,192 tokens) is also run with GOAL_PACKS_PER_RANK
GOAL_PACKS_PER_RANK = (1, 2, 8, 16)
SAMPLED_WORLDS, SAMPLED_CAPACITY, SAMPLED_STEPS = (2, 3, 4, 8, 16, 64), 8192, 40
MAX_TOKENS = 1e8  # simulated per cell, so that the largest takes seconds


def main() -> None:
    """All cells, a table, a picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=Path, required=True, help=".npy of real token counts")
    parser.add_argument("--out", type=Path, help="folder for balance.json and balance.png")
    options = parser.parse_args()
    started = time.perf_counter()
    cells = [
        cell(name, lengths_of(name, options.lengths, capacity), capacity, world, PACKS_PER_RANK)
        for name in ("real", "heavy tail")
        for capacity in CAPACITIES
        for world in WORLDS
    ]
    heavy = lengths_of("heavy tail", options.lengths, 8192)
    goal = [cell("heavy tail", heavy, 8192, 8, packs_per_rank) for packs_per_rank in GOAL_PACKS_PER_RANK]
    sampled = [
        sampled_cell(name, lengths_of(name, options.lengths, SAMPLED_CAPACITY), world)
        for name in ("real", "heavy tail")
        for world in SAMPLED_WORLDS
    ]
    for row in [*cells, *goal, *sampled]:
        print(describe(row))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions("numpy"),
        "cells": [*cells, *goal],
        "cells_of_samples": sampled,
    }
    if options.out:
        (options.out / "balance.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(cells, options.out / "balance.png")


def lengths_of(name: str, real: Path, capacity: int) -> np.ndarray:
    """Token counts to draw from: Alpaca's, or a Pareto tail (shape 1.2) from 60 tokens up to the capacity."""
    if name == "real":
        return np.load(real)
    tail = (np.random.default_rng(0).pareto(1.2, 200_000) + 1) * 60
    return np.minimum(tail, capacity).astype(np.int64)


def cell(name: str, pool: np.ndarray, capacity: int, world: int, packs_per_rank: int) -> dict:
    """Imbalance of one setting."""
    rng = np.random.default_rng(1)
    packs_per_step = world * packs_per_rank
    num_steps = int(np.clip(MAX_TOKENS / (packs_per_step * capacity), 1, 100))
    lengths = rng.choice(pool, int(1.05 * num_steps * packs_per_step * capacity / pool.mean()) + 1)
    trained = trained_of(lengths, rng)
    packs = pack(lengths, capacity=capacity, seed=0)
    costs = PER_TOKEN * lengths + PER_SQUARE * lengths.astype(float) ** 2 + PER_TRAINED * trained
    of_packs = np.add.reduceat(costs[packs.indices], packs.offsets[:-1])
    steps = [of_packs[i : i + packs_per_step] for i in range(0, num_steps * packs_per_step, packs_per_step)]
    steps = [s for s in steps if len(s) == packs_per_step]
    where = {"lengths": name, "capacity": capacity, "world": world, "packs_per_rank": packs_per_rank}
    return where | measured(steps, world, rng)


def sampled_cell(name: str, pool: np.ndarray, world: int) -> dict:
    """Imbalance of steps of so many samples, about two and a half packs' worth of tokens a rank."""
    rng = np.random.default_rng(1)
    samples_per_step = round(2.5 * world * SAMPLED_CAPACITY / pool.mean())
    lengths = rng.choice(pool, SAMPLED_STEPS * samples_per_step)
    schedule = Schedule(
        lengths=lengths,
        num_trained=trained_of(lengths, rng),
        capacity=SAMPLED_CAPACITY,
        seed=0,
        epochs=1,
        world=world,
        samples_per_step=samples_per_step,
        cost=CostCoefficients(per_token=PER_TOKEN, per_square=PER_SQUARE, per_trained=PER_TRAINED),
    )
    packs = [schedule.step(number).packs for number in range(schedule.num_steps)]
    steps = [np.array([schedule.pack_cost(pack) for pack in step]) for step in packs]
    where = {"lengths": name, "capacity": SAMPLED_CAPACITY, "world": world}
    where |= {"samples_per_step": samples_per_step, "packs_per_rank": max(map(len, packs)) // world}
    return where | measured(steps, world, rng)


def trained_of(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Trained tokens of samples: two fifths of each on average."""
    return np.ceil(lengths * rng.beta(2, 3, len(lengths)))


def measured(steps: list[np.ndarray], world: int, rng: np.random.Generator) -> dict:
    """Imbalance of steps, given the costs of their packs, a multiple of `world` each."""
    dealt = [loads(s, deal(s, world=world)) for s in steps]
    random = [rng.permutation(s).reshape(world, -1) for s in steps]
    return {
        "steps": len(steps),
        "dealt": {"step": waiting(dealt, False), "micro-batch": waiting(dealt, True)},
        "random": {"step": waiting(random, False), "micro-batch": waiting(random, True)},
    }


def loads(costs: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """(world, micro-batches) cost of what each rank runs."""
    return np.where(dealt == IDLE, 0.0, costs[dealt])


def waiting(steps: list[np.ndarray], in_every_micro_batch: bool) -> float:
    """Imbalance of (world, micro-batches) loads."""
    if in_every_micro_batch:
        slowest = sum(step.max(0).sum() for step in steps)
    else:
        slowest = sum(step.sum(1).max() for step in steps)
    return float(slowest / sum(step.sum() / len(step) for step in steps) - 1)


def describe(row: dict) -> str:
    """One line of the table."""
    d, r = row["dealt"], row["random"]
    return (
        f"{row['lengths']:<11} {row['capacity']:>7} tokens {row['world']:>5} x {row['packs_per_rank']:>2}  "
        f"step: dealt {d['step']:7.2%} "
        f"random {r['step']:7.2%}   micro-batch: dealt {d['micro-batch']:7.2%} random {r['micro-batch']:7.2%}"
    )


def draw(cells: list[dict], path: Path) -> None:
    """Imbalance over ranks, one panel per kind of lengths and wait."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    colours = dict(zip(CAPACITIES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    for column, lengths in enumerate(("real", "heavy tail")):
        for line, wait in enumerate(("step", "micro-batch")):
            axes = panels[line][column]
            for capacity in CAPACITIES:
                rows = [c for c in cells if c["lengths"] == lengths and c["capacity"] == capacity]
                worlds = [c["world"] for c in rows]
                for kind, style in (("dealt", "-"), ("random", ":")):
                    values = [100 * max(c[kind][wait], 1e-4) for c in rows]
                    label = f"{capacity // 1024}k {kind}"
                    axes.plot(worlds, values, style, color=colours[capacity], marker="o", ms=3, label=label)
            axes.set(xscale="log", yscale="log", title=f"{lengths} lengths, waiting once a {wait}")
            axes.set_xticks(WORLDS, [str(w) for w in WORLDS])
            axes.axhline(1, color="grey", lw=0.5)
    panels[1][0].set(xlabel="ranks", ylabel="imbalance, %")
    panels[0][0].legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
