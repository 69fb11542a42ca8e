"""Running `sftcore` as a user does, in the current folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import warm
import yaml
from warm import BIN


def sftcore(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command; whatever it does, it must not show a traceback."""
    done = warm.run([str(BIN / "sftcore"), *arguments], env=dict(os.environ), timeout=300)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def save(recipe: dict, **changes) -> str:
    """Write recipe.yaml; returns its path."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return "recipe.yaml"
