"""`sftcore restore`: options -> the folders that `sftcore.knowledge.restore` writes.

In: two model folders, a percentage or several. Out: one folder, or a folder of folders; a line for each.
Invariant: every mistake in the options is reported before a weight is read.
Trade-off: a sweep writes a whole model for each percentage (0.3 GB each for 135M weights in bfloat16).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sftcore.errors import Problem, UserInputError
from sftcore.knowledge.restore import restore


def restore_model(
    base: Path, tuned: Path, to: Path, *, fraction: float | None, sweep: str | None
) -> list[str]:
    """Write TO, or TO/q1, TO/q3 and so on; returns a line for each folder.

    Raises:
        UserInputError: not exactly one of `fraction` and `sweep`, folders that are swapped, or as `restore`
            says.
    """
    if (fraction is None) == (sweep is None):
        raise UserInputError(
            Problem(what="give exactly one of --fraction and --sweep", allowed="--sweep 0,1,3,5,10,20,40,60")
        )
    targets = {fraction: to} if fraction is not None else _targets(sweep or "", to)
    if (start := _trained_from(base)) and start.resolve() == tuned.resolve():
        what, remedy = "these two are swapped: --base was trained from --tuned", "swap them"
        raise UserInputError(Problem(what=what, where=f"--base {base}", remedy=remedy))
    reports = restore(base, tuned, targets)
    return [f"{targets[percent]}: {_told(report)}" for percent, report in reports.items()]


def _trained_from(folder: Path) -> Path | None:
    """What RUN/model was trained from, as RUN/recipe.yaml says; None where nothing says it."""
    path = folder.resolve().parent / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    match recipe:
        case {"model": {"path": str(start)}}:
            return Path(start)
    return None


def _told(report: dict[str, Any]) -> str:
    if not report["num_restored"]:
        return f"none of {report['num_weights']:,} weights restored"
    return (
        f"{report['num_restored']:,} of {report['num_weights']:,} weights restored, "
        f"those that changed by {report['threshold']} or more of their base value"
    )


def _targets(sweep: str, to: Path) -> dict[float, Path]:
    try:
        percents = [float(word) for word in sweep.split(",")]
    except ValueError as error:
        raise UserInputError(
            Problem(what="percentages with commas between them", where="--sweep", got=sweep)
        ) from error
    return {percent: to / f"q{percent:g}" for percent in percents}
