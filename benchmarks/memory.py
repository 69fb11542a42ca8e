"""Peak memory per rank as `sftcore plan` predicts it, beside what the run measured, on CPUs.

    python -m benchmarks.memory --model .cache/models/smollm2-135m --other .cache/models/gemma3-270m

Each case trains about three steps of one full pack a rank through `sftcore train` (two ranks: `--on node`);
measured is the highest resident memory of any rank in metrics.jsonl. Writes benchmarks/results/memory.json.
With --predict-again nothing is trained: the plan's bytes are computed anew beside the peaks recorded there.
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

import yaml

from benchmarks.measure import versions
from sftcore.fsio import read_json, read_jsonl
from sftcore.recipe import load_recipe
from sftcore.train.devices import device_here
from sftcore.train.memory import predict_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "memory.json"
STEPS = 3
TOKENS_OF_ITEM = 66
WORDS = "the small boat crossed a wide river while people on the bank waved and sang".split()


def main() -> None:
    """Run the cases, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="a second model, of another architecture")
    parser.add_argument("--predict-again", action="store_true", help="keep the recorded peaks")
    options = parser.parse_args()
    rows = []
    recorded = read_json(RESULTS) if options.predict_again else {}
    peaks = {row["case"]: row for row in recorded.get("rows", [])}
    with tempfile.TemporaryDirectory() as scratch:
        for name, changes, world in cases(options.model.resolve(), options.other.resolve()):
            path = write_recipe(Path(scratch), name, changes, world)
            peak = peaks[name] if recorded else train(path, name, world)
            rows.append({"case": name, "world": world} | predicted_beside(peak, path, world))
            print(describe(rows[-1]), flush=True)
    report = {"date": time.strftime("%Y-%m-%d"), "versions": versions("torch", "deepspeed")} | recorded
    RESULTS.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


def cases(model: Path, other: Path) -> list[tuple[str, dict, int]]:
    """(name, recipe changes, ranks)."""
    full = {"model": {"path": str(model)}, "deepspeed": "zero1"}
    gemma = {"model": {"path": str(other)}}
    recomputed = {"train": {"activation_checkpointing": "full"}}
    return [
        ("full, 512 tokens", full | tokens(512), 1),
        ("full, 2,048 tokens", full | tokens(2048), 1),
        ("full, 2,048 tokens, checkpointing", full | tokens(2048) | recomputed, 1),
        ("lora, 2,048 tokens", full | tokens(2048) | {"adapter": {"kind": "lora"}}, 1),
        ("qlora, 1,024 tokens", full | tokens(1024) | {"adapter": {"kind": "qlora"}}, 1),
        ("full, ZeRO-2, 1,024 tokens", full | tokens(1024) | {"deepspeed": "zero2"}, 2),
        ("full, ZeRO-3, 1,024 tokens", full | tokens(1024) | {"deepspeed": "zero3"}, 2),
        ("full, ZeRO-1, two ranks, 512 tokens", full | tokens(512), 2),
        ("other model, LoRA, 1,024 tokens", full | tokens(1024) | gemma | {"adapter": {"kind": "lora"}}, 1),
        ("other model, 512 tokens", full | tokens(512) | gemma, 1),
    ]


def tokens(capacity: int) -> dict:
    """Packs of about this many tokens."""
    return {"batch": {"capacity": capacity}}


def write_items(scratch: Path, count: int) -> Path:
    """Items of about TOKENS_OF_ITEM tokens."""
    path = scratch / "items.jsonl"
    with open(path, "w") as handle:
        for number in range(count):
            text = " ".join(WORDS[(number * 7 + k) % len(WORDS)] for k in range(60))
            handle.write(json.dumps({"prompt": f"Story {number}:", "completion": f" {text}"}) + "\n")
    return path


def write_recipe(scratch: Path, name: str, changes: dict, world: int) -> Path:
    """A case's recipe, beside its items."""
    capacity = changes["batch"]["capacity"]
    items = write_items(scratch, STEPS * world * capacity // TOKENS_OF_ITEM)
    changes = changes | {"batch": {"tokens_per_step": world * capacity, "capacity": capacity}}
    folder = scratch / "".join(c if c.isalnum() else "-" for c in name)
    recipe = {
        "name": "memory",
        "run": str(folder),
        "data": {"train": [{"format": "jsonl", "path": str(items)}]},
        "tracking": {"tensorboard": False},
        **changes,
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(path: Path, name: str, world: int) -> dict:
    """Train; the largest pack's tokens and the highest peak of a rank."""
    command = [str(Path(sys.executable).parent / "sftcore"), "train", str(path)]
    if world > 1:
        command += ["--on", "node", "--ranks-per-node", str(world)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(f"{name} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    steps = read_jsonl(path.with_suffix("") / "metrics.jsonl")
    return {
        "num_tokens": max(step["num_tokens"] for step in steps) // world,
        "measured_bytes": max(step["peak_memory_bytes"] for step in steps),
    }


def predicted_beside(peak: dict, path: Path, world: int) -> dict:
    """Predicted and measured bytes of a pack."""
    num_tokens = peak["num_tokens"]
    predicted = predict_bytes(load_recipe(path), world=world, num_tokens=num_tokens, device=device_here())
    return {
        "num_tokens": num_tokens,
        "predicted": predicted,
        "predicted_bytes": sum(predicted.values()),
        "measured_bytes": peak["measured_bytes"],
    }


def describe(row: dict) -> str:
    """One line."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in row["predicted"].items())
    ratio = row["predicted_bytes"] / row["measured_bytes"] - 1
    return (
        f"{row['case']:<36} {row['num_tokens']:>5} tokens  predicted {row['predicted_bytes'] / 1e9:.2f} GB "
        f"({parts})  measured {row['measured_bytes'] / 1e9:.2f} GB  {ratio:+.0%}"
    )


if __name__ == "__main__":
    main()
