"""Progress without a terminal: lines now and then, whatever is counted."""

from __future__ import annotations

import logging
import subprocess
import sys

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


def test_an_adapter_run_is_not_told_of_a_package_that_it_needs_nothing_of():
    """bitsandbytes, which peft imports, asks for `kernels` on CPUs with bfloat16 instructions."""
    code = "import sftcore.log; sftcore.log.setup_logging(); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
