"""Training samples per second and peak memory, side by side with TRL's SFTTrainer on the same machine.

    python -m benchmarks.train --model .cache/models/smollm2-135m --trl-python TRL_VENV/bin/python \
        --items ../shared/data/entityquestions --samples-per-step 64 --steps 4 --rounds 5

Same model, same items in the same order, same number of samples per step, loss on the answers only.
TRL runs padded and packed with bfloat16 weights (8 bytes a weight with gradient and moments), and padded as
it is by default, with float32 weights under autocast (16, and 2 for the cast ones during a step); ours
keeps float32 master weights and gradients (18). Systems take turns, each in its own process; of every
process the first step is warm-up. With `--dtype float32` (the default where a CPU has no bfloat16
instructions) all weights and all arithmetic of both are float32 (16 bytes a weight on both sides).
Reported: the median over rounds of the median step, first-step losses, peak resident memory, the
optimizer's share of our step; then, on the same machine, where the time goes (`benchmarks.breakdown`).
The result replaces that of the same model and step size in results/train.json; results/train.png shows all.
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

import torch

from benchmarks.measure import limits
from sftcore.precision import dtype_here

HERE = Path(__file__).parent
SYSTEMS = ("ours", "trl-padded", "trl-packed", "trl-float32")
AUTOCAST = "trl-float32"
COLOURS = ("#0072b2", "#d55e00", "#cc79a7", "#999999")


def main() -> None:
    """Run all rounds, print the table, append the results."""
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        items = write_items(options, Path(scratch))
        systems = [s for s in SYSTEMS if s != AUTOCAST or options.dtype == "bfloat16"]
        runs: dict[str, list[dict]] = {system: [] for system in systems}
        for number in range(options.rounds):
            for system in systems:
                result = run(system, options, items)
                runs[system].append(result)
                print(f"round {number + 1} {system}: {result['step_seconds']:.2f} s a step", flush=True)
        breakdown = run("breakdown", options, items)
    report = summarise(options, runs) | {"breakdown": breakdown}
    print(table(report))
    path = HERE / "results" / "train.json"
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    kept = [r for r in earlier if key(r) != key(report)]
    reports = sorted([*kept, report], key=key)
    path.write_text(json.dumps(reports, indent=1) + "\n")
    draw(reports, path.with_suffix(".png"))


def key(report: dict) -> tuple[str, int, str, str]:
    """What a report is of; the first ones were all of bfloat16 with AVX-512."""
    kind = report.get("cpu_capability", "AVX512")
    return report["model"], report["samples_per_step"], report.get("dtype", "bfloat16"), kind


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
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=dtype_here())
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
    python = str(options.trl_python) if system.startswith("trl") else sys.executable
    scripts = {"ours": "train_ours.py", "breakdown": "breakdown.py"}
    script = HERE / scripts.get(system, "train_trl.py")
    arguments = [str(options.model), str(items), str(options.samples_per_step), str(options.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    command = [python, str(script), *arguments, options.dtype, system.removeprefix("trl-")]
    environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().split("\n")[-1])
    if "steps" in result:
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
    systems["ours"]["update_seconds"] = median(median(r["updates"]) for r in runs["ours"])
    ours = systems["ours"]["samples_per_second"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        "samples_per_step": options.samples_per_step,
        "steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "processor": processor(),
        "dtype": options.dtype,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "limited_by": limits(),
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
    ours = report["systems"]["ours"]
    lines.append(f"  the optimizer takes {ours['update_seconds'] / ours['step_seconds']:.0%} of our step")
    parts = report["breakdown"]["forward_and_backward_seconds"]
    lines += [f"  {seconds:>7.2f} s  {name}" for name, seconds in parts.items()]
    for system, ratio in report["times_as_fast"].items():
        lines.append(f"  ours is {ratio:.2f} times as fast as {system}")
    return "\n".join(lines)


def draw(reports: list[dict], path: Path) -> None:
    """Speed and peak memory of the systems, and the parts of our step, one group of bars per report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5), layout="constrained")
    speed, memory, parts = figure.subplots(1, 3)
    names = [
        r["model"].replace("-", "-\n", 1) + f"\n{r['samples_per_step']} a step{_in_float32(r)}"
        for r in reports
    ]
    for panel, quantity in ((speed, _samples_per_second), (memory, _peak_gigabytes)):
        for number, (system, colour) in enumerate(zip(SYSTEMS, COLOURS, strict=True)):
            there = [(i, r["systems"][system]) for i, r in enumerate(reports) if system in r["systems"]]
            places = [i + 0.21 * (number - 1.5) for i, _ in there]
            values = [quantity(measured) for _, measured in there]
            panel.bar_label(
                panel.bar(places, values, 0.2, color=colour, label=system), fmt="%.1f", fontsize=7
            )
        panel.set(xticks=range(len(names)), xticklabels=names)
    speed.set(title="samples per second")
    speed.legend(fontsize=8)
    memory.set(title="peak resident memory, GB")
    shares = [shares_of_step(r) for r in reports]
    below = [0.0] * len(reports)
    for part, colour in zip(shares[0], ("#009e73", "#56b4e9", "#e69f00", "#f0e442", "#999999"), strict=True):
        values = [100 * share[part] for share in shares]
        parts.bar(range(len(reports)), values, 0.6, bottom=below, color=colour, label=part)
        below = [a + b for a, b in zip(below, values, strict=True)]
    parts.set(title="our step, %", xticks=range(len(names)), xticklabels=names)
    parts.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def _in_float32(report: dict) -> str:
    return f"\nfloat32,\n{report['cpu_capability']}" if report.get("dtype") == "float32" else ""


def _samples_per_second(system: dict) -> float:
    return system["samples_per_second"]


def _peak_gigabytes(system: dict) -> float:
    return system["peak_resident_bytes"] / 1e9


def shares_of_step(report: dict) -> dict[str, float]:
    """Parts of our step, from the breakdown and the timed update; they add up to 1 where nothing overlaps."""
    seconds = report["breakdown"]["forward_and_backward_seconds"]
    step, update = report["systems"]["ours"]["step_seconds"], report["systems"]["ours"]["update_seconds"]
    decoder, limit = seconds["ours, decoder alone"], seconds["products of the decoder"]
    parts = {
        "decoder: matrix products at the machine's limit": limit,
        "decoder: attention, norms, the rest": decoder - limit,
        "head and loss": seconds["ours"] - decoder,
        "optimizer": update,
    }
    parts["DeepSpeed, collating, the rest"] = max(0.0, step - sum(parts.values()))
    return {name: value / step for name, value in parts.items()}


if __name__ == "__main__":
    main()
