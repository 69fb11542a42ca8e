"""One GPU: attention, head, whole training steps, their levers, and TRL on the same card. Under nine minutes.

    python -m benchmarks.gpu --out benchmarks/results            # a CUDA device; writes gpu.json
    python -m benchmarks.gpu --device cpu --tiny --out FOLDER    # the same code in a minute, to see it run

Sections run one after another, the hottest first, until `--minutes` are used up; what was not reached is
listed as `not run`, never guessed. A measurement that fails is recorded with its error and the others go on.
Times are medians of synchronised runs after warm-up. `python -m benchmarks.results_page` makes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch

from benchmarks import gpu_kernels, gpu_step, gpu_trl
from benchmarks.gpu_clock import Case, Target

OPTIONAL = ("deepspeed", "liger-kernel", "flash-attn", "bitsandbytes", "trl", "datasets", "peft", "triton")


def main() -> None:
    """Run the sections, print a line a measurement, write the JSON after each."""
    options = parse()
    started = time.perf_counter()
    target = Target(
        device=torch.device(options.device), is_tiny=options.tiny, lengths=read_lengths(options.lengths)
    )
    report = {"date": time.strftime("%Y-%m-%d"), "environment": environment(target), "rows": []}
    for case in sections(target, options.only):
        left = 60 * options.minutes - (time.perf_counter() - started)
        row = case.description | (measure(case.run) if left > case.seconds else {"state": "not run"})
        report["rows"].append(row)
        print(describe(row), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.perf_counter() - started:.0f} s")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of a few thousand weights")
    parser.add_argument("--lengths", type=Path, help=".npy of real token counts; else a log-normal like them")
    parser.add_argument("--only", help="sections to run, by the beginnings of their names, comma-separated")
    return parser.parse_args()


def read_lengths(path: Path | None) -> np.ndarray:
    """Token counts to draw documents from; without a file a log-normal with Alpaca's mean (77) and spread."""
    if path is not None:
        return np.load(path)
    drawn = np.random.default_rng(0).lognormal(mean=4.17, sigma=0.6, size=50_000)
    return np.clip(drawn, 8, 1024).astype(np.int64)


def environment(target: Target) -> dict:
    """Machine and versions."""
    on_gpu = target.device.type == "cuda"
    found = {name: metadata.version(name) for name in OPTIONAL if _is_installed(name)}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": metadata.version("transformers"),
        "absent": [name for name in OPTIONAL if name not in found],
        **found,
    }


def _is_installed(name: str) -> bool:
    return any(name == d.name for d in metadata.distributions()) or (
        util.find_spec(name.replace("-", "_")) is not None and name in metadata.packages_distributions()
    )


def sections(target: Target, only: str | None) -> Iterator[Case]:
    """All measurements, the hottest first."""
    wanted = only.split(",") if only else [""]
    for cases in (
        gpu_kernels.limit_cases,
        gpu_kernels.attention_cases,
        gpu_step.step_cases,
        gpu_trl.cases,
        gpu_kernels.head_cases,
        gpu_step.lever_cases,
    ):
        for case in cases(target):
            if any(case.description["section"].startswith(name) for name in wanted):
                yield case


def measure(run: Callable[[], dict]) -> dict:
    """The measurement's figures, or why there are none."""
    try:
        return {"state": "ok"} | run()
    except ModuleNotFoundError as error:
        return {"state": "not run", "reason": f"{error.name} is not installed"}
    except Exception as error:  # whatever a kernel or a package raises is a result of its own
        return {"state": "failed", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def describe(row: dict) -> str:
    """One line."""
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    return "  ".join(shown)


if __name__ == "__main__":
    main()
