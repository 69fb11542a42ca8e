"""`sftcore report`: a run or study folder -> its page.

In: a folder that stages have written to. Out: report.html and report.json there, and a table.
Invariant: whether a folder is a run's or a study's is read from what is in it.
Trade-off: a page is made from files alone (1.6 s for 22,000 items), so it can be made again anywhere.
"""

from __future__ import annotations

from pathlib import Path

from sftcore.study.report import ReportResult, write_report
from sftcore.study.study_report import write_study_report
from sftcore.study.study_runs import is_study


def report(folder: Path | str) -> ReportResult:
    """Write report.html and report.json of a run, or of a folder of runs.

    Raises:
        UserInputError: neither is there, or a file is damaged.
    """
    folder = Path(folder)
    return write_study_report(folder) if is_study(folder) else write_report(folder)
