"""The doctor tries things: what works is ok with its version, what breaks has a reason and a remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import BIN, run

from sftcore.launcher import doctor
from sftcore.launcher.doctor import BROKEN, MISSING, OK, Finding, is_able, line_of


@pytest.mark.slow
def test_this_machine_can_train_and_every_problem_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(str(BIN / "sftcore"), "doctor", "--json", "--run", "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in found}
    for name in ("python", "torch", "deepspeed", "run folder", "compiler", "bitsandbytes"):
        assert states[name] == OK, found
    assert any(name.startswith("all-reduce") for name in states)
    assert all(f["remedy"] for f in found if f["state"] != OK and f["name"] != "deepspeed ops")
    assert not list(Path("runs").iterdir()), "it cleans up"


def test_what_crashes_hangs_or_is_absent_is_a_finding(monkeypatch, tmp_path):
    failure, _ = doctor.probe("import os; os.abort()")
    assert failure == "exit code -6"
    assert doctor.probe("raise ImportError('no libfoo')")[0] == "ImportError: no libfoo"
    assert doctor.probe("print(7)") == ("", "7")
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    assert "no answer in" in doctor.probe("import time; time.sleep(9)")[0]
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("", "sftcore[gpu]", "nothing")})
    assert [f.state for f in doctor.check_optional()] == [MISSING]
    monkeypatch.setattr(doctor, "OPTIONAL", {"numpy": ("raise OSError('bad build')", "numpy", "numbers")})
    [finding] = doctor.check_optional()
    assert finding.state == BROKEN and "bad build" in finding.found and "pip install" in finding.remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [f.state for f in (*doctor.check_compiler(), *doctor.check_slurm())] == [MISSING, MISSING]


def test_a_folder_without_atomic_renames_is_broken(monkeypatch, tmp_path):
    """A rename that is a copy, as some network file systems have it: the reader sees half a file."""

    def slow_copy(source, target):
        text = Path(source).read_text()
        with open(target, "w") as handle:
            for part in (text[:1000], text[1000:]):
                handle.write(part)
                handle.flush()

    assert doctor.check_renames(tmp_path).state == OK
    monkeypatch.setattr(os, "replace", slow_copy)
    found = doctor.check_renames(tmp_path)
    assert found.state == BROKEN and "half a file" in found.found and "--run DIR" in found.remedy


def test_what_is_needed_decides():
    fine = Finding(name="a", state=OK, found="1", needed=True)
    optional = Finding(name="b", state=MISSING, found="", remedy="pip install b")
    assert is_able([fine, optional])
    assert not is_able([fine, Finding(name="c", state=BROKEN, found="x", needed=True)])
    assert line_of(fine) == "ok        a: 1"
    assert line_of(optional) == "missing   b\n          do: pip install b"


@pytest.mark.parametrize("free", [0, 10**12])
def test_disk_space(monkeypatch, tmp_path, free):
    usage = doctor.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    states = [f.state for f in doctor.check_disk(tmp_path / "absent" / "runs")]
    assert states == ([OK, OK] if free else [BROKEN, BROKEN])
