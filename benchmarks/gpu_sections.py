"""The GPU benchmark's sections: their order, their shares of the time, their rows, the file of them.

In: the command's options. Out: gpu.json, written anew after each row; a line a row.
Invariant: every section begins if the time allows any of its cases; every case has a row, measured or not.
Trade-off: a case is not interrupted: one that takes far longer than its estimate costs the next sections.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from benchmarks import gpu_kernels, gpu_step, gpu_trl
from benchmarks.gpu_clock import Case, Target
from benchmarks.gpu_needs import OPTIONAL, version_of

SECTIONS = (  # the most valuable first; ZeRO-3 last, since it leaves most behind in the process
    gpu_kernels.limit_cases,
    gpu_kernels.head_cases,
    gpu_step.step_cases,
    gpu_trl.cases,
    gpu_step.lever_cases,
    gpu_kernels.attention_cases,
    gpu_step.zero3_cases,
)
Rows = list[dict]


def run_sections(options: argparse.Namespace, *, started: float) -> None:
    """Measure, print a line a row, write the file after each."""
    lengths = read_lengths(options.lengths)
    target = Target(device=torch.device(options.device), is_tiny=options.tiny, lengths=lengths)
    about = environment(target, options.lengths)
    groups = chosen_cases(target, options.only)
    rerun = {case.description["section"] for group in groups for case in group}
    file = options.out / "gpu.json"
    kept = kept_rows(file, about, rerun) if options.only else []
    today = time.strftime("%Y-%m-%d")
    unreached = {"date": today, "state": "not run", "reason": "no time was left"}
    rows = {id(case): case.description | unreached for group in groups for case in group}
    for case in take_turns(groups, seconds=60 * options.minutes, started=started):
        begun = time.perf_counter()
        found = measure(case.run)
        took = {"estimated_seconds": case.seconds, "took_seconds": time.perf_counter() - begun}
        rows[id(case)] = {**case.description, "date": today, **found, **took}
        print(describe(rows[id(case)]), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"date": today, "environment": about, "rows": [*kept, *rows.values()]}
        file.write_text(json.dumps(report, indent=1) + "\n")
    num_unreached = sum("took_seconds" not in row for row in rows.values())
    print(f"{time.perf_counter() - started:.0f} s, {num_unreached} of {len(rows)} cases not reached")


def read_lengths(path: Path | None) -> np.ndarray:
    """Token counts to draw documents from; without a file a log-normal with Alpaca's mean (77) and spread."""
    if path is not None:
        return np.load(path)
    drawn = np.random.default_rng(0).lognormal(mean=4.17, sigma=0.6, size=50_000)
    return np.clip(drawn, 8, 1024).astype(np.int64)


def environment(target: Target, lengths: Path | None) -> dict:
    """Machine and versions, and which shapes and lengths were asked for."""
    on_gpu = target.device.type == "cuda"
    found = {name: version for name in (*OPTIONAL, "triton") if (version := version_of(name))}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cores": os.cpu_count(),
        "shapes": "tiny" if target.is_tiny else "full",
        "lengths": lengths.name if lengths else "log-normal",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version_of("transformers"),
        "absent": [name for name in OPTIONAL if name not in found],
        **found,
    }


def chosen_cases(target: Target, only: str | None) -> list[list[Case]]:
    """The cases of each section that is asked for."""
    wanted = tuple(only.split(",")) if only else ("",)
    groups = [
        [case for case in cases(target) if case.description["section"].startswith(wanted)]
        for cases in SECTIONS
    ]
    return [group for group in groups if group]


def take_turns(
    groups: list[list[Case]],
    *,
    seconds: float,
    started: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Case]:
    """The cases for which there is time, in the order in which to run them.

    Shares are as the groups' estimates. Each group has its first case, as long as the whole time allows it;
    what is left at the end goes to those passed over.
    """

    def fits(case: Case, end: float) -> bool:
        return clock() - started + case.seconds <= end

    passed_over = []
    sums = list(accumulate(sum(case.seconds for case in group) for group in groups))
    for group, share in zip(groups, sums, strict=True):
        for number, case in enumerate(group):
            end = seconds if number == 0 else seconds * share / sums[-1]
            if fits(case, end):
                yield case
            else:
                passed_over.append(case)
    yield from (case for case in passed_over if fits(case, seconds))


def kept_rows(file: Path, about: dict, rerun: set[str]) -> Rows:
    """The file's rows of other sections, unless they are of another machine or other versions."""
    if not file.is_file():
        return []
    report = json.loads(file.read_text())
    if report["environment"] != about:
        print(f"{file} is of another environment: begun anew")
        return []
    return [row for row in report["rows"] if row["section"] not in rerun]


def measure(run: Callable[[], dict]) -> dict:
    """The measurement's figures, or why there are none."""
    try:
        return {"state": "ok"} | run()
    except ModuleNotFoundError as error:
        return {"state": "not run", "reason": f"{error.name} is not installed"}
    except Exception as error:  # whatever a kernel or a package raises is a result of its own
        message = next(iter(str(error).splitlines()), "")
        return {"state": "failed", "error": f"{type(error).__name__}: {message[:300]}".removesuffix(": ")}


def describe(row: dict) -> str:
    """One line."""
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    return "  ".join(shown)
