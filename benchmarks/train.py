"""Training samples per second, side by side with TRL's SFTTrainer (padded and packed) on the same machine.

    python -m benchmarks.train --model .cache/models/smollm2-135m --trl-python TRL_VENV/bin/python \
        --items ../shared/data/entityquestions --samples-per-step 64 --steps 4 --rounds 5

Same model, same items in the same order, same number of samples per step, loss on the answers only, bfloat16
(ours keeps float32 master weights). Systems take turns, each in its own process; of every process the first
step is warm-up. Reported: the median over rounds of the median step, first-step losses, peak resident memory.
Results are appended to benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
SYSTEMS = ("ours", "trl-padded", "trl-packed")


def main() -> None:
    """Run all rounds, print the table, append the results."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        items = write_items(options, Path(scratch))
        runs: dict[str, list[dict]] = {system: [] for system in SYSTEMS}
        for number in range(options.rounds):
            for system in SYSTEMS:
                result = run(system, options, items)
                runs[system].append(result)
                print(f"round {number + 1} {system}: {result['step_seconds']:.2f} s a step", flush=True)
    report = summarise(options, runs)
    print(table(report))
    path = HERE / "results" / "train.json"
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, report], indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True, help="folder of EntityQuestions")
    parser.add_argument("--samples-per-step", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def write_items(options: argparse.Namespace, scratch: Path) -> Path:
    """Prompt and completion of each item, from all relations in turn, as both systems read them."""
    files = sorted((options.items / "train").glob("P*.train.json"))
    relations = [json.loads(file.read_text()) for file in files]
    path = scratch / "items.jsonl"
    count = options.samples_per_step * (options.steps + 1)
    with open(path, "w") as handle:
        for number in range(count):
            item = relations[number % len(relations)][number // len(relations)]
            row = {
                "prompt": f"<|question|> {item['question']} <|answer|>",
                "completion": f" {item['answers'][0]}",
            }
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def run(system: str, options: argparse.Namespace, items: Path) -> dict:
    """One process of one system; its last line of output is JSON."""
    python = sys.executable if system == "ours" else str(options.trl_python)
    script = HERE / ("train_ours.py" if system == "ours" else "train_trl.py")
    arguments = [str(options.model), str(items), str(options.samples_per_step), str(options.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    command = [python, str(script), *arguments, system.removeprefix("trl-")]
    environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().split("\n")[-1])
    result["step_seconds"] = median(result["steps"])
    return result


def summarise(options: argparse.Namespace, runs: dict[str, list[dict]]) -> dict:
    """Medians over rounds, and ratios to ours."""
    systems = {}
    for system, results in runs.items():
        seconds = median(r["step_seconds"] for r in results)
        systems[system] = {
            "samples_per_second": options.samples_per_step / seconds,
            "step_seconds": seconds,
            "step_seconds_of_rounds": [r["step_seconds"] for r in results],
            "first_loss": results[0]["first_loss"],
            "peak_resident_bytes": max(r["peak_resident_bytes"] for r in results),
            "versions": results[0]["versions"],
        }
    ours = systems["ours"]["samples_per_second"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        "samples_per_step": options.samples_per_step,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "processor": processor(),
        "load_average_at_end": os.getloadavg(),
        "systems": systems,
        "times_as_fast": {s: ours / v["samples_per_second"] for s, v in systems.items() if s != "ours"},
    }


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(report: dict) -> str:
    """A few lines for the terminal."""
    lines = [f"{report['model']}, {report['samples_per_step']} samples a step, median of {report['rounds']}"]
    for system, row in report["systems"].items():
        lines.append(
            f"  {system:<11} {row['samples_per_second']:>7.2f} samples/s  {row['step_seconds']:>6.2f} s  "
            f"first loss {row['first_loss']:.4f}  peak {row['peak_resident_bytes'] / 1e9:.2f} GB"
        )
    for system, ratio in report["times_as_fast"].items():
        lines.append(f"  ours is {ratio:.2f} times as fast as {system}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
