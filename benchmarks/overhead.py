"""What a step costs beside forward, backward and update: from a run's own metrics.jsonl.

    python -m benchmarks.overhead RUN [--out benchmarks/results]

In: the folder of a finished run. Out: a line, and overhead.json with --out.
Invariant: shares are of the wall time from the end of the first step (which warms up) to the end of the last.
Trade-off: saving checkpoints is counted under "between steps", since a run can't train meanwhile; a run that
saves rarely shows what the loop itself costs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import versions
from sftcore.fsio import read_jsonl


def main() -> None:
    """Print the shares; write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="folder for overhead.json")
    options = parser.parse_args()
    recipe = yaml.safe_load((options.run / "recipe.yaml").read_text(encoding="utf-8"))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("torch", "deepspeed"),
        "model": Path(recipe["model"]["path"]).name,
        "batch": recipe["batch"],
    } | shares(read_jsonl(options.run / "metrics.jsonl"))
    print(json.dumps(report))
    if options.out:
        (options.out / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


def shares(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Where the wall time goes, as shares of it.

    >>> last = {"elapsed_seconds": 19.0, "data_seconds": 0.1, "compute_seconds": 9.8}
    >>> found = shares([{"elapsed_seconds": 9.0}, last])
    >>> [round(found[key], 3) for key in ("seconds", "compute", "batches", "between_steps", "outside")]
    [10.0, 0.98, 0.01, 0.01, 0.02]
    """
    first, *rest = steps
    seconds = rest[-1]["elapsed_seconds"] - first["elapsed_seconds"]
    compute = sum(step["compute_seconds"] for step in rest) / seconds
    batches = sum(step["data_seconds"] for step in rest) / seconds
    return {
        "num_steps": len(rest),
        "seconds": seconds,
        "compute": compute,
        "batches": batches,
        "between_steps": 1 - compute - batches,
        "outside": 1 - compute,
    }


if __name__ == "__main__":
    main()
