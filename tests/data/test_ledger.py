"""The ledger: every row accounted for, every reason explained."""

from __future__ import annotations

import errno
import json
import tempfile

import pytest

from sftcore.data.ledger import (
    HYGIENE,
    LISTED_ALTERATIONS_PER_KIND,
    PROMPTING,
    READING,
    TRIVIAL,
    Alteration,
    Change,
    Ledger,
    Reason,
    Rejection,
    printable,
)
from sftcore.errors import MissingEnvironmentError, UserInputError


def rejection(row: int, reason: Reason = Reason.UNKNOWN_LABEL, **more) -> Rejection:
    return Rejection(file="pairs.tsv", row=row, reason=reason, excerpt=f"row {row}", **more)


def test_every_reason_belongs_to_one_stage():
    stages = (READING, HYGIENE, PROMPTING, TRIVIAL)
    assert frozenset().union(*stages) == frozenset(Reason)
    assert sum(map(len, stages)) == len(Reason)


def test_rows_read_are_rows_passed_on_plus_rejections(tmp_path):
    ledger = Ledger()
    passed = list(ledger.take([1, rejection(2), 3, rejection(4, Reason.LEAK)]))
    assert passed == [1, 3]
    assert (ledger.num_rows_read, ledger.num_rejected) == (4, 2)
    ledger.write(tmp_path / "ledger.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["row"], line["reason"]) for line in lines] == [
        ("rejected", 2, "unknown_label"),
        ("rejected", 4, "leak"),
    ]


def test_alterations_are_all_counted_but_listed_only_at_first():
    ledger = Ledger()
    for row in range(100):
        ledger.alter(Alteration(file="f", row=row, change=Change.SEAM_APART))
    assert ledger.altered_by_reason == {"seam_apart": 100}
    assert len(list(ledger.entries())) == LISTED_ALTERATIONS_PER_KIND == 20


def test_rejections_are_all_listed_even_beyond_the_spool():
    ledger = Ledger()
    for row in range(20_000):
        ledger.reject(rejection(row))
    assert [entry["row"] for entry in ledger.entries()] == list(range(20_000))
    ledger.reject(rejection(7))
    assert sum(1 for _ in ledger.entries()) == 20_001


def test_too_many_rejections_name_reasons_rows_and_remedy():
    ledger = Ledger()
    for row in range(1, 6):
        ledger.reject(rejection(row, detail="label 'x'"))
    ledger.check(0.05, reasons=READING, num_rows=100)
    with pytest.raises(UserInputError, match="5 of 99 rows can't be used") as caught:
        ledger.check(0.05, reasons=READING, num_rows=99)
    message = str(caught.value)
    assert "unknown_label: 5" in message
    assert [f"pairs.tsv:{row}: unknown_label (label 'x')" in message for row in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert "matching.labels" in message and "max_reject_fraction (now 0.05)" in message


def test_what_hygiene_drops_is_no_fault_of_the_file():
    ledger = Ledger()
    for row in range(50):
        ledger.reject(rejection(row, Reason.LEAK))
    ledger.check(0.0, reasons=READING, num_rows=100)
    ledger.check(0.0, reasons=PROMPTING, num_rows=100)
    assert ledger.num_rejected == 50


def test_excerpts_are_one_printable_line():
    assert printable("a\tb\n\0") == "a\\tb\\n\\x00"
    assert printable("\udcff") == "\\udcff"
    assert printable("ü北") == "ü北"
    assert len(printable("x" * 1000)) == 80


def test_odd_bytes_in_a_file_name_reach_the_disk(tmp_path):
    ledger = Ledger()
    ledger.reject(Rejection(file="caf\udce9.tsv", row=1, reason=Reason.LEAK))
    ledger.write(tmp_path / "ledger.jsonl")
    assert "caf\\\\udce9.tsv" in (tmp_path / "ledger.jsonl").read_text()
    assert "caf\\udce9.tsv:1: leak" in str(Rejection(file="caf\udce9.tsv", row=1, reason=Reason.LEAK))


def test_full_temporary_disk_is_explained(monkeypatch):
    ledger = Ledger()

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ledger, "_spool", Full())
    with pytest.raises(MissingEnvironmentError, match="No space left") as caught:
        ledger.reject(rejection(1))
    assert tempfile.gettempdir() in str(caught.value)
