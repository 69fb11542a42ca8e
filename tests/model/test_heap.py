"""Kernels of past shapes don't pile up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sftcore.heap import KEPT_KERNELS, forget_old_kernels

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
GROWTH = """
import resource
import torch
from sftcore.heap import forget_old_kernels

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

forget_old_kernels()
weight = torch.ones(512, 512, dtype=torch.bfloat16)
with torch.no_grad():
    for rows in (900, *range(100, 800)):
        torch.nn.functional.linear(torch.ones(rows, 512, dtype=torch.bfloat16), weight)
        if rows == 100:
            before = peak()
print(peak() - before)
"""


def growth(**environment: str) -> float:
    """MB that products of 700 shapes add to a process."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", GROWTH]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return float(done.stdout)


def test_products_of_many_shapes_keep_less_than_torch_alone_would():
    by_torch = growth(**dict.fromkeys(NAMES, "1024"))
    if by_torch < 50:
        pytest.skip("this CPU's products don't go through oneDNN")
    assert growth() < by_torch / 2


def test_a_users_own_limit_is_kept(monkeypatch):
    monkeypatch.setenv(NAMES[0], "7")
    monkeypatch.delenv(NAMES[1], raising=False)
    forget_old_kernels()
    assert (os.environ[NAMES[0]], os.environ[NAMES[1]]) == ("7", str(KEPT_KERNELS))
    monkeypatch.delenv(NAMES[1])
