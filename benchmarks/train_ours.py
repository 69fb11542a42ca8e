"""Our side of benchmarks/train.py: MODEL ITEMS SAMPLES_PER_STEP STEPS DTYPE SYSTEM -> one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.measure import peak_resident_bytes, versions
from sftcore.batching.collate import collate
from sftcore.batching.packing import pack
from sftcore.config import Recipe
from sftcore.data.prepare import prepare_store
from sftcore.data.tokens import load_tokenizer
from sftcore.objectives import load_objective
from sftcore.recipe import deepspeed_file
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import Engine, init_process_group


def main() -> None:
    """Train and time; the samples of step s are rows s * n to (s + 1) * n of the items."""
    model_path, items, per_step, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    recipe = Recipe.model_validate(
        {
            "model": {"path": model_path, "dtype": sys.argv[5]},
            "data": {"train": [{"format": "jsonl", "path": items}]},
            "batch": {"samples_per_step": per_step, "capacity": 4096},
        }
    )
    store = prepare_store(recipe, load_tokenizer(model_path), cache_root=Path(items).parent / "stores")
    init_process_group()
    model = load_objective(recipe)
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    seconds, losses, updates = [], [], []
    update = engine.deepspeed.step

    def timed_update() -> None:
        started = time.perf_counter()
        update()
        updates.append(time.perf_counter() - started)

    engine.deepspeed.step = timed_update
    for number in range(steps + 1):
        started = time.perf_counter()
        rows = slice(number * per_step, (number + 1) * per_step)
        packs = pack(store.lengths[rows], capacity=4096, seed=number)
        trained = int(store.num_trained[rows].sum())
        batches = [
            collate(
                [store[rows.start + int(i)] for i in packs[p]],
                normalise="token",
                num_trained_in_step=trained,
                num_samples_in_step=per_step,
            )
            for p in range(len(packs))
        ]
        result = engine.step(batches, seeds=[0] * len(batches), rates={"lr": 1e-5})
        seconds.append(time.perf_counter() - started)
        losses.append(result.loss)
    print(
        json.dumps(
            {
                "steps": seconds[1:],
                "updates": updates[1:],
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "peak_resident_bytes": peak_resident_bytes(),
                "num_tokens": int(store.lengths.sum()),
                "num_trained_tokens": int(store.num_trained.sum()),
                "versions": versions("torch", "transformers", "deepspeed"),
            }
        )
    )


if __name__ == "__main__":
    main()
