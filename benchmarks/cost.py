"""The cost model beside the seconds of two real ranks.

    python -m benchmarks.cost --model .cache/models/smollm2-135m

Trains steps of four packs of heavy-tailed documents with unequal trained shares by two ranks on CPUs, one
thread each. For every step but the first: imbalance (slowest rank / mean - 1) as the plan predicts it for the
dealing that was run, and as the ranks' forward and backward seconds gave it (metrics.jsonl). Besides, how
well predicted FLOPs of a step explain its seconds. Writes benchmarks/results/cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks.measure import versions
from benchmarks.memory import WORDS
from sftcore.batching.dealing import IDLE
from sftcore.data.prepare import prepare_store
from sftcore.data.tokens import load_tokenizer
from sftcore.fsio import read_jsonl
from sftcore.model.cost import measure_recipe
from sftcore.recipe import load_recipe
from sftcore.train.plan import make_schedule

HERE = Path(__file__).parent
WORLD, CAPACITY, PACKS_PER_STEP, STEPS = 2, 512, 4, 16


def main() -> None:
    """Train, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = write_recipe(Path(scratch), options.model.resolve())
        recipe = load_recipe(path)
        train(path)
        steps = read_jsonl(recipe.run_folder / "metrics.jsonl")
        store = prepare_store(recipe, load_tokenizer(recipe.model.path))
        cost = measure_recipe(recipe).coefficients
        schedule = make_schedule(recipe, store, world=WORLD, cost=cost)
        rows = [compare(schedule, step) for step in steps[1:]]
    predicted, measured = (np.array([row[key] for row in rows]) for key in ("predicted", "measured"))
    flops, seconds = (np.array([row[key] for row in rows]) for key in ("flops", "seconds"))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        "versions": versions("torch", "deepspeed"),
        "steps": rows,
        "mean_predicted_imbalance": float(predicted.mean()),
        "mean_measured_imbalance": float(measured.mean()),
        "mean_absolute_difference": float(np.abs(predicted - measured).mean()),
        "correlation_of_flops_and_seconds": float(np.corrcoef(flops, seconds)[0, 1]),
    }
    (HERE / "results" / "cost.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "steps"}, indent=1))


def write_recipe(scratch: Path, model: Path) -> Path:
    """A recipe and its items: Pareto lengths (shape 1.2), between a tenth and nine tenths of them trained."""
    rng = np.random.default_rng(0)
    items, total = scratch / "items.jsonl", 0
    with open(items, "w") as handle:
        while total < STEPS * PACKS_PER_STEP * CAPACITY:
            length = int(min(0.8 * CAPACITY, 20 * (rng.pareto(1.2) + 1)))
            words = [str(rng.choice(WORDS)) for _ in range(length)]
            cut = max(1, int(length * rng.uniform(0.1, 0.9)))
            row = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:] or ["end"])}
            handle.write(json.dumps(row) + "\n")
            total += length
    recipe = {
        "name": "cost",
        "run": str(scratch / "run"),
        "model": {"path": str(model)},
        "data": {"train": [{"format": "jsonl", "path": str(items)}]},
        "batch": {"tokens_per_step": PACKS_PER_STEP * CAPACITY, "capacity": CAPACITY},
        "train": {"epochs": 1},
        "tracking": {"tensorboard": False},
    }
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(path: Path) -> None:
    """Two ranks with a thread each."""
    command = [str(Path(sys.executable).parent / "sftcore"), "train", str(path)]
    command += ["--on", "node", "--ranks-per-node", str(WORLD)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def compare(schedule, metrics: dict) -> dict:
    """Predicted and measured imbalance of a step, its FLOPs and seconds."""
    step = schedule.step(metrics["step"] - 1)
    costs = np.array([schedule.pack_cost(pack) for pack in step.packs])
    dealt = schedule.deal(step)
    loads = np.where(dealt == IDLE, 0.0, np.append(costs, 0.0)[dealt]).sum(1)
    return {
        "step": metrics["step"],
        "predicted": float(loads.max() / loads.mean() - 1),
        "measured": metrics["rank_imbalance"],
        "flops": float(costs.sum()),
        "seconds": metrics["compute_seconds"],
    }


if __name__ == "__main__":
    main()
