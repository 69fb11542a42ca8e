"""What several benchmarks record: versions and peak memory. Imports nothing but the standard library."""

from __future__ import annotations

import resource
from importlib import metadata


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {package: metadata.version(package) for package in packages}


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
