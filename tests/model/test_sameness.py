"""Whether there is room for a model: of the machine, and of what a job or a container may take of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftcore.model import sameness
from sftcore.model.sameness import MARGIN, has_room_for


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """One with 1,000 KiB available and no limits yet."""
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    (tmp_path / "groups/job/step").mkdir(parents=True)
    monkeypatch.setattr(sameness, "MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(sameness, "GROUP_FILE", tmp_path / "cgroup")
    monkeypatch.setattr(sameness, "GROUPS", tmp_path / "groups")
    return tmp_path


def limit(folder: Path, most: str, used: int, cached: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def has_exactly(num_bytes: int) -> bool:
    return has_room_for(int(num_bytes / MARGIN) - 1) and not has_room_for(int(num_bytes / MARGIN) + 1)


def test_the_machine_decides_where_nothing_limits(machine):
    assert has_exactly(1_024_000)
    limit(machine / "groups/job/step", "max", 500, 0, sameness.V2)
    assert has_exactly(1_024_000)
    (machine / "cgroup").unlink()
    assert has_exactly(1_024_000)


def test_the_tightest_group_around_the_process_decides(machine):
    limit(machine / "groups/job/step", "900000", 100_000, 0, sameness.V2)
    assert has_exactly(800_000)
    limit(machine / "groups/job", "300000", 200_000, 50_000, sameness.V2)
    assert has_exactly(150_000)


def test_groups_of_the_older_kind_decide_too(machine):
    (machine / "cgroup").write_text("3:cpu:/job\n4:memory:/job\n")
    limit(machine / "groups/memory/job", "400000", 100_000, 0, sameness.V1)
    assert has_exactly(300_000)
