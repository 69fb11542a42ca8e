"""What several benchmarks record: versions and peak memory. Imports nothing but the standard library."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {package: metadata.version(package) for package in packages}


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far; `getrusage` would count in its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
