"""Packing: packs, utilisation, seconds and memory, beside TRL's `pack_dataset(strategy="bfd")`.

    python -m benchmarks.packing --lengths LENGTHS.npy --trl-python TRL/bin/python --out benchmarks/results

Without --lengths a drawn length distribution is used, without --trl-python ours alone is measured. Medians
of five, the two in turn, each call in this (or TRL's) process after one call of warm-up. Writes
OUT/packing.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.measure import peak_resident_bytes, versions
from sftcore.batching.packing import pack

CAPACITY = 4096
ROUNDS = 5
MANY_ROWS = 10_000_000
TRL = """
import sys, time, json, numpy as np
from importlib import metadata
from datasets import Dataset
from trl import pack_dataset
lengths = np.load(sys.argv[1])
rows = Dataset.from_dict({"input_ids": [[0] * int(n) for n in lengths]})
pack_dataset(rows.select(range(1000)), int(sys.argv[2]), "bfd")
for _ in sys.stdin:
    started = time.perf_counter()
    packs = pack_dataset(rows, int(sys.argv[2]), "bfd")
    seconds = time.perf_counter() - started
    version = metadata.version("trl")
    print(json.dumps({"packs": len(packs), "seconds": seconds, "version": version}), flush=True)
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=Path, help=".npy of token counts")
    parser.add_argument("--trl-python", type=Path, help="python of an environment with TRL")
    parser.add_argument("--out", type=Path, help="folder for packing.json")
    options = parser.parse_args()
    lengths = np.load(options.lengths) if options.lengths else drawn_lengths()
    report = {"date": time.strftime("%Y-%m-%d"), "capacity": CAPACITY, "rows": len(lengths)}
    report |= side_by_side(lengths, options.trl_python)
    many = np.random.default_rng(0).choice(lengths, MANY_ROWS)
    started = time.perf_counter()
    packs = pack(many, capacity=CAPACITY, seed=0)
    report["ten_million_rows"] = {
        "seconds": time.perf_counter() - started,
        "utilisation": float(many.sum() / (len(packs) * CAPACITY)),
        "peak_resident_bytes": peak_resident_bytes(),
    }
    report["versions"] = versions("numpy")
    print(json.dumps(report, indent=1))
    if options.out:
        (options.out / "packing.json").write_text(json.dumps(report, indent=1) + "\n")


def drawn_lengths() -> np.ndarray:
    """52,002 lengths with a long tail, where no real ones are given."""
    return np.clip(np.random.default_rng(0).lognormal(4.1, 0.65, 52_002), 8, 1112).astype(np.int32)


def side_by_side(lengths: np.ndarray, trl_python: Path | None) -> dict:
    """Medians of both, in turn."""
    pack(lengths[:1000], capacity=CAPACITY, seed=0)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "lengths.npy", lengths)
        command = [str(trl_python), "-c", TRL, str(Path(scratch) / "lengths.npy"), str(CAPACITY)]
        peer = None
        if trl_python:
            peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(ROUNDS):
            started = time.perf_counter()
            packs = pack(lengths, capacity=CAPACITY, seed=number)
            ours.append({"packs": len(packs), "seconds": time.perf_counter() - started})
            if peer:
                theirs.append(ask(peer))
        if peer:
            peer.communicate()
    total = int(lengths.sum())
    report = {"optimum": -(-total // CAPACITY), "ours": summary(ours, total), "trl": summary(theirs, total)}
    if theirs:
        report["times_as_fast"] = report["trl"]["seconds"] / report["ours"]["seconds"]
        report["trl"]["version"] = theirs[0]["version"]
    return report


def ask(peer: subprocess.Popen) -> dict:
    """One call in TRL's process."""
    peer.stdin.write("go\n")
    peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        sys.exit("TRL's process ended; see above")
    return json.loads(line)


def summary(calls: list[dict], total: int) -> dict:
    """Packs, utilisation and median seconds of some calls."""
    if not calls:
        return {}
    packs = calls[0]["packs"]
    return {
        "packs": packs,
        "utilisation": total / (packs * CAPACITY),
        "seconds": median(c["seconds"] for c in calls),
        "seconds_of_rounds": [c["seconds"] for c in calls],
    }


if __name__ == "__main__":
    main()
