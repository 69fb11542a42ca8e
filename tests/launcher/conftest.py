"""The lab of simulated machines, for the modules that send jobs to it."""

from __future__ import annotations

import pytest
from cluster import started_cluster


@pytest.fixture(scope="module")
def lab():
    with started_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(lab):
    """The lab with both nodes up and no jobs."""
    assert lab.script("start.sh").returncode == 0
    yield lab
    lab.script("in.sh", "scancel", "-u", "root")
