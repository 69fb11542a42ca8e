"""Durations, sizes and work are written in one place, by rules that can be checked by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcore.amounts import counted, duration, plural, rate, size, work

ROOT = Path(__file__).parent.parent
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
BYTES = {unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB", "EB"))}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1e-4, "under 0.1 s"),  # 2.79e-08 hours
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (599.4, "9 min 59 s"),
        (599.6, "10 min"),
        (3569, "59 min"),
        (3571, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (86399, "1 d 0 h"),
        (90000, "1 d 1 h"),
        (100 * 86400, "100 d"),
    ],
)
def test_durations_by_hand(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3.6e9, "3.6 GB"),
        (999_600_000, "1.0 GB"),
        (1.4e11, "140 GB"),
    ],
)
def test_sizes_by_hand(num_bytes, text):
    assert size(num_bytes) == text


def test_parts_of_a_sum_have_its_unit():
    parts = [2.7e8, 1.9e9, 4e6]
    assert [size(part, against=sum(parts)) for part in parts] == ["0.27 GB", "1.90 GB", "0.00 GB"]
    assert size(sum(parts), against=sum(parts)) == "2.17 GB"
    assert work(2.79e15) == "2.8 PFLOP"


def value_of(text: str, units: dict[str, int]) -> float:
    return sum(float(n.replace(",", "")) * units[u] for n, u in re.findall(r"([\d.,]+) (\w+)", text))


@given(st.floats(0, 1e12))
def test_no_exponent_and_no_digit_is_wrong(value):
    shown = duration(value)
    assert "e" not in shown.replace("under", "")
    assert value_of(shown, SECONDS) == pytest.approx(value, rel=0.06, abs=0.1)
    shown = size(value)
    assert re.fullmatch(r"[\d.,]+ [kMGTPE]?B", shown)
    assert value_of(shown, BYTES) == pytest.approx(value, rel=0.06, abs=0.5)


def test_nobody_else_writes_sizes_and_durations():
    """Rates (GB/s, TFLOP/s of a data sheet) apart, no text is made of a division by 1e9 or 3600."""
    own = re.compile(r"\{[^{}]*/ (1e9|1e6|3600|60)(:[^{}]*)?\}")
    rates = ("GFLOP/s", "GB/s", "bfloat16, float32 =")
    files = [file for top in ("launcher", "sftcore") for file in sorted((ROOT / top).rglob("*.py"))]
    lines = [
        (file.name, line) for file in files for line in file.read_text().splitlines() if own.search(line)
    ]
    assert len(files) > 100
    others = [line for line in lines if line[0] != "amounts.py"]
    assert [line for line in others if not any(rate in line[1] for rate in rates)] == []


def test_one_thing_is_never_many_and_rates_have_no_exponent():
    assert [counted(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert [plural(noun) for noun in ("batch", "epoch", "process", "reply", "box")] == [
        "batches",
        "epochs",
        "processes",
        "replies",
        "boxes",
    ]
    assert [rate(value) for value in (2e-5, 1e-5, 3.3333e-7, 0.0, 1.0)] == [
        "0.00002",
        "0.00001",
        "0.000000333",
        "0",
        "1",
    ]


def test_no_message_leaves_the_number_open():
    """ "1 step(s)": `counted` says which it is."""
    files = [file for top in ("sftcore", "launcher") for file in (ROOT / top).rglob("*") if file.is_file()]
    texts = {file: file.read_text() for file in files if file.suffix in (".py", ".html", ".md")}
    assert len(texts) > 150
    nouns = "step|pack|token|rank|epoch|sample|run|row|fact|pair|file|item|batch"
    assert not [file for file, text in texts.items() if re.search(rf"({nouns})\(s\)[ ,;\"]", text)]
