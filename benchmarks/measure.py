"""What several benchmarks record: versions and peak memory. Imports nothing but the standard library."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # they imitate a lesser CPU


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {package: metadata.version(package) for package in packages}


def limits() -> dict[str, str]:
    """Variables of this process that keep torch and oneDNN from instructions that the CPU has."""
    return {name: os.environ[name] for name in LIMITS if name in os.environ}


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far; `getrusage` would count in its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
