"""Speed of `sftcore prepare` beside raw `tokenizers` and TRL, its memory, and how fast it starts.

In: GSM8K's training rows seven times (SFTCORE_TEST_DATA), SmolLM2's tokenizer. Out: results/prepare.json.
Invariant: contestants take turns within a round, each in a fresh process that is timed after its imports and
after the tokenizer is loaded; medians over the rounds.
Trade-off: raw `tokenizers` writes nothing, masks nothing and checks nothing; it is the ceiling, not a peer.

    SFTCORE_TEST_DATA=../shared/data .venv/bin/python benchmarks/prepare.py --trl-python TRL/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = ".cache/models/smollm2-135m"
PACKAGES = ("tokenizers", "transformers", "numpy", "pyarrow")
BATCH = 1024


def write_gsm8k(path: Path, copies: int = 7) -> int:
    """Prompt and completion rows; returns their number."""
    text = (Path(os.environ["SFTCORE_TEST_DATA"]) / "gsm8k/train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] * copies
    with open(path, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps({"prompt": row["question"] + "\n", "completion": row["answer"]}) + "\n")
    return len(rows)


def write_short_rows(path: Path, num_rows: int) -> None:
    """Distinct rows of about 25 tokens."""
    with open(path, "w", encoding="utf-8") as handle:
        for i in range(num_rows):
            row = {"prompt": f"Question: what comes right after {i}?\nAnswer:", "completion": f" {i + 1}"}
            handle.write(json.dumps(row) + "\n")


def run_raw(path: Path, _: Path) -> dict[str, Any]:
    """`tokenizers` alone, all cores: each row's text as one string, in batches."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] + row["completion"] for row in rows]
    started = time.perf_counter()
    num_tokens = 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        num_tokens += sum(len(encoding.ids) for encoding in encodings)
    return {"seconds": time.perf_counter() - started, "num_tokens": num_tokens}


def _recipe(path: Path) -> Any:
    from sftcore.config import Recipe

    return Recipe.model_validate(
        {
            "model": {"path": MODEL},
            "data": {"train": [{"format": "jsonl", "path": str(path)}]},
            "batch": {"samples_per_step": 8},
        }
    )


def run_ours(path: Path, cache: Path) -> dict[str, Any]:
    """From the file to an open, verified store."""
    from sftcore.data.prepare import prepare_store
    from sftcore.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    started = time.perf_counter()
    store = prepare_store(_recipe(path), tokenizer, cache_root=cache)
    seconds = time.perf_counter() - started
    usage = [
        resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return {
        "seconds": seconds,
        "num_tokens": store.manifest["num_tokens"],
        "num_samples": len(store),
        "peak_bytes_parent": usage[0],
        "peak_bytes_worker": usage[1],
    }


def run_start(path: Path, cache: Path) -> dict[str, Any]:
    """From a ready store to the first batch, after imports."""
    from sftcore.batching.collate import collate
    from sftcore.data.prepare import prepare_store
    from sftcore.data.tokens import load_tokenizer
    from sftcore.train.plan import make_schedule

    started = time.perf_counter()
    recipe = _recipe(path)
    store = prepare_store(recipe, load_tokenizer(MODEL), cache_root=cache)
    step = make_schedule(recipe, store, world=1).step(0)
    samples = [store[int(i)] for i in step.packs[0]]
    collate(
        samples,
        normalise="token",
        num_trained_in_step=step.num_trained_tokens,
        num_samples_in_step=step.num_samples,
        idle=False,
    )
    return {"seconds": time.perf_counter() - started}


ROLES = {"raw": run_raw, "ours": run_ours, "start": run_start}


def measured(role: str, path: Path, cache: Path, trl_python: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    script = [trl_python, str(HERE / "prepare_trl.py")] if role == "trl" else [sys.executable, __file__]
    command = [*script, "--role", role, "--file", str(path), "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{role} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare_speed(folder: Path, rounds: int, trl_python: str) -> dict[str, Any]:
    """Rounds of raw, ours, TRL, cold start, warm start."""
    path = folder / "gsm8k_x7.jsonl"
    num_rows = write_gsm8k(path)
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for role in ("raw", "ours", *(["trl"] if trl_python else [])):
            cache = folder / role
            shutil.rmtree(cache, ignore_errors=True)
            results.setdefault(role, []).append(measured(role, path, cache, trl_python))
        results.setdefault("start_first", []).append(measured("start", path, folder / "ours", ""))
        time.sleep(2)  # checksums of files younger than 2 s are not remembered
        results.setdefault("start_second", []).append(measured("start", path, folder / "ours", ""))
        print(number, {role: round(runs[-1]["seconds"], 2) for role, runs in results.items()}, flush=True)
    seconds = {role: median(run["seconds"] for run in runs) for role, runs in results.items()}
    num_tokens = results["raw"][0]["num_tokens"]  # of the same text, without stop tokens
    speeds = {role: num_tokens / seconds[role] for role in ("raw", "ours", "trl") if role in seconds}
    return {
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "median_seconds": seconds,
        "tokens_per_second": speeds,
        "ours_over_raw": speeds["ours"] / speeds["raw"],
        "ours_over_trl": speeds["ours"] / speeds["trl"] if "trl" in speeds else None,
        "rounds": {role: [run["seconds"] for run in runs] for role, runs in results.items()},
    }


def compare_memory(folder: Path, exponents: list[int]) -> list[dict[str, Any]]:
    """Peak resident bytes of the parent and of the largest worker, by number of rows."""
    rows = []
    for exponent in exponents:
        path, cache = folder / f"short_{exponent}.jsonl", folder / "memory"
        write_short_rows(path, 10**exponent)
        result = measured("ours", path, cache, "")
        start = measured("start", path, cache, "")
        rows.append({"num_rows": 10**exponent, **result, "start_seconds": start["seconds"]})
        print(rows[-1], flush=True)
        shutil.rmtree(cache)
        path.unlink()
    return rows


def main() -> None:
    """Run the benchmark, or one role of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--trl-python", default="", help="python of an environment with trl 1.16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exponents", type=int, nargs="*", default=[4, 5, 6, 7])
    parser.add_argument("--role", choices=[*ROLES, "trl"])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    if options.role:
        print(json.dumps(ROLES[options.role](options.file, options.cache)))
        return
    target = HERE / "results/prepare.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="sftcore-prepare-") as name:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "num_cores": len(os.sched_getaffinity(0)),
            "load_average_before": os.getloadavg(),
        }
        if options.rounds:
            known["speed"] = about | compare_speed(Path(name), options.rounds, options.trl_python)
        if options.exponents:
            known["memory"] = about | {"by_rows": compare_memory(Path(name), options.exponents)}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
