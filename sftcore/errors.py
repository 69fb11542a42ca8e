"""The errors a user sees, and the exit code that goes with each.

In: facts about what went wrong (what, got, allowed, where, remedy). Out: one readable message, one exit
code.
Invariant: every foreseeable failure is an `SftError`; a traceback on the terminal is always our bug.
A message is bounded and can be shown anywhere: no passwords of URLs, no control characters (display.py).
Trade-off: problems are collected and raised together, so one round of edits fixes a recipe with three
mistakes (the price is that a check must not rely on an earlier one having passed).
"""

from __future__ import annotations

from dataclasses import dataclass

from sftcore.display import shown

MAX_LETTERS = 2000  # of one part of a message; of a file's path a quarter
MAX_PROBLEMS = 40  # spelt out
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_RANK_LOST = 69  # EX_UNAVAILABLE of sysexits.h: another rank is gone; requeue me
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: requeue me
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it: a second Ctrl-C


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Args:
        what: the sentence a user reads first.
        where: file:line or config key.
        got: the offending value.
        allowed: what would have been accepted.
        remedy: what to do about it.
    """

    what: str
    where: str = ""
    got: str = ""
    allowed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = shown(self.where.replace("\n", "\\n"), MAX_LETTERS // 4)
        what = shown(self.what, MAX_LETTERS)
        lines = [f"{where}: {what}" if where else what]
        for label, text in (("got", self.got), ("allowed", self.allowed), ("do", self.remedy)):
            if text:
                lines.append(f"    {label}: {shown(text, MAX_LETTERS)}")
        return "\n".join(lines)


class SftError(Exception):
    """A failure with a message fit for a terminal; holds one or more `Problem`s."""

    exit_code = EXIT_FAILED

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(what=p) for p in problems)
        more = len(self.problems) - MAX_PROBLEMS
        lines = [str(p) for p in self.problems[:MAX_PROBLEMS]]
        super().__init__("\n".join([*lines, *([f"... and {more} more problems"] if more > 0 else [])]))


class UserInputError(SftError):
    """The user's input is wrong: recipe, data, arguments, a run folder in use."""

    exit_code = EXIT_USER_INPUT


class MissingEnvironmentError(SftError):
    """The environment lacks something: a package, disk space, a file with the right checksum."""

    exit_code = EXIT_ENVIRONMENT


class StoppedOnRequest(SftError):
    """Stopped by a signal after a checkpoint was committed; the job should be queued again."""

    exit_code = EXIT_STOPPED


class EnoughSteps(StoppedOnRequest):
    """As many steps were done as this start was asked for."""

    exit_code = EXIT_DONE


class RankLost(SftError):
    """Another rank ended or can't be reached; this one is whole, and the run goes on from its checkpoint."""

    exit_code = EXIT_RANK_LOST


class TrainingFailed(SftError):
    """The run itself failed, e.g. a loss that is not finite."""


def error_of_code(code: int, what: str) -> SftError:
    """The error for what another process of ours ended with, so that its exit code is handed on."""
    kinds = (UserInputError, MissingEnvironmentError, StoppedOnRequest, RankLost)
    return {kind.exit_code: kind for kind in kinds}.get(code, TrainingFailed)(what)
