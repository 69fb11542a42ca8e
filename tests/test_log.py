"""Progress without a terminal: lines now and then, whatever is counted."""

from __future__ import annotations

import logging

from sftcore import log as module
from sftcore.log import log, progress, setup_logging


def test_nothing_done_yet_is_no_reason_to_fail(monkeypatch, capsys):
    monkeypatch.setattr(module, "PLAIN_LINE_SECONDS", 0.0)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "level", logging.INFO)
    setup_logging()
    with progress("preparing", 3) as advance:
        advance(0)
        advance(2)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("preparing: 2/3, about 0 s left") and len(said) == 2
