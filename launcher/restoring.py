"""`sftcore restore`: options -> the folders that `sftcore.knowledge.restore` writes.

In: two model folders, a percentage or several. Out: one folder, or a folder of folders; a line for each.
Invariant: every mistake in the options is told before a weight is read.
Trade-off: a sweep writes a whole model for each percentage (0.3 GB each for 135M weights in bfloat16).
"""

from __future__ import annotations

from pathlib import Path

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.restore import restore


def restore_model(
    base: Path, tuned: Path, to: Path, *, fraction: float | None, sweep: str | None
) -> list[str]:
    """Write TO, or TO/q1, TO/q3 and so on; returns a line for each folder.

    Raises:
        UserInputError: not exactly one of `fraction` and `sweep`, or as `restore` says.
    """
    if (fraction is None) == (sweep is None):
        raise UserInputError(
            Problem(what="give exactly one of --fraction and --sweep", allowed="--sweep 0,1,3,5,10,20,40,60")
        )
    targets = {fraction: to} if fraction is not None else _targets(sweep or "", to)
    reports = restore(base, tuned, targets)
    return [
        f"{targets[percent]}: {report['num_restored']:,} of {report['num_weights']:,} weights restored, "
        f"those that changed by {report['threshold']} or more of their base value"
        for percent, report in reports.items()
    ]


def _targets(sweep: str, to: Path) -> dict[float, Path]:
    try:
        percents = [float(word) for word in sweep.split(",")]
    except ValueError as error:
        raise UserInputError(
            Problem(what="percentages with commas between them", where="--sweep", got=sweep)
        ) from error
    return {percent: to / f"q{percent:g}" for percent in percents}
