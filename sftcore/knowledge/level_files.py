"""The memory levels that a run folder holds: found, read, compared with today's facts.

In: a run folder, a model's fingerprint, the records that the data files give now. Out: `FactLevel`s.
Invariant: a level is used only for the fact that was probed: same split, id, relation, subject and answers;
and only from files that hold every fact's.
Trade-off: facts are compared one by one, not by one checksum over all, so that a message can name one that
has changed; 0.1 s for 100,000 facts next to the seconds that reading them takes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftcore.data.records import Record
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import read_jsonl, read_object
from sftcore.knowledge.levels import FactLevel
from sftcore.tasks.kinds.fact import fact_in

LEVELS_FILE, LEVELS_MANIFEST, LEVELS_BY_TEMPLATE = (
    "levels.jsonl",
    "levels.manifest.json",
    "levels.templates.json",
)
LEVEL_FILES = (LEVELS_FILE, LEVELS_MANIFEST, LEVELS_BY_TEMPLATE)
PROBE_AGAIN = "put a good copy of the file there, or probe again: sftcore probe RECIPE"
log = logging.getLogger(__name__)


def holds_levels(run: Path) -> bool:
    """Whether all files of a finished probe are there."""
    return all((run / name).is_file() for name in LEVEL_FILES)


def is_probed(run: Path, manifest: dict[str, Any]) -> bool:
    """Whether the run folder holds levels made from exactly these inputs."""
    if not holds_levels(run):
        return False
    try:
        kept = read_object(run / LEVELS_MANIFEST)
        if _with_dtype(kept, manifest["dtype"]) != manifest:
            return False
        read_object(run / LEVELS_BY_TEMPLATE)
        _whole_levels(run, kept)
    except UserInputError as error:
        log.warning("probing again: %s", error)
        return False
    return True


def _whole_levels(run: Path, manifest: dict[str, Any]) -> list[FactLevel]:
    """The rows of levels.jsonl, if they are rows of levels and as many as the manifest says.

    Raises:
        UserInputError: naming the file and the line.
    """
    path = run / LEVELS_FILE
    levels = [_level_of(row, f"{path}:{number}") for number, row in enumerate(read_jsonl(path), 1)]
    expected = manifest.get("num_facts", len(levels))
    if len(levels) != expected:
        what, got = "rows are missing, or too many", f"{len(levels)}, where {LEVELS_MANIFEST} says {expected}"
        raise UserInputError(Problem(what=what, where=str(path), got=got, remedy=PROBE_AGAIN))
    return levels


def _level_of(row: dict[str, Any], where: str) -> FactLevel:
    texts = [row.get(key, "") for key in ("id", "relation", "subject", "split")]
    answers, counts = row.get("answers", []), [row.get(key, 0) for key in ("hits", "trials")]
    is_row = isinstance(answers, list) and all(isinstance(text, str) for text in [*texts, *answers])
    if not (is_row and all(type(count) is int for count in counts)):
        raise UserInputError(Problem(what="no memory level", where=where, remedy=PROBE_AGAIN))
    return FactLevel.from_row(row)


def _with_dtype(manifest: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A manifest; earlier versions did not note the dtype, which RUN/recipe.yaml holds in place of it."""
    return {"dtype": dtype, **manifest}


def read_levels(run: Path, *, model_fingerprint: str, dtype: str) -> list[FactLevel]:
    """Levels of a run folder.

    Args:
        dtype: in which the model is held now.

    Raises:
        UserInputError: there are none, or they are another model's or another dtype's.
    """
    if not ((run / LEVELS_FILE).is_file() and (run / LEVELS_MANIFEST).is_file()):
        raise UserInputError(
            Problem(what="no memory levels yet", where=str(run), remedy="run: sftcore probe RECIPE")
        )
    manifest = read_object(run / LEVELS_MANIFEST, "model_fingerprint")
    found = manifest["model_fingerprint"]
    if found != model_fingerprint:
        raise UserInputError(
            Problem(
                what="these memory levels belong to another model"
                + ("" if "code" in manifest else ", or were measured by an earlier version of sftcore"),
                where=str(run / LEVELS_FILE),
                got=found,
                allowed=model_fingerprint,
                remedy="sftcore probe RECIPE (with another --run to keep the old levels)",
            )
        )
    probed_in = _with_dtype(manifest, dtype)["dtype"]
    if probed_in != dtype:
        raise UserInputError(
            Problem(
                what="these memory levels were measured in another dtype",
                where=str(run / LEVELS_FILE),
                got=probed_in,
                allowed=dtype,
                remedy=f"--set model.dtype={probed_in}, or probe again: sftcore probe RECIPE (with another"
                " --run to keep the old levels)",
            )
        )
    return _whole_levels(run, manifest)


def check_same_facts(levels: Sequence[FactLevel], records: Sequence[Record], *, where: Path) -> None:
    """Refuse levels of facts that the data files no longer hold under the same split and id.

    Rows without an id are named by their place, so one row more at the top of a file moves every level below
    it to the next fact.

    Args:
        records: of the same splits, as the data files give them now.
        where: the file of the levels, for the message.

    Raises:
        UserInputError: naming the first fact that has changed or gone, and how many have.
    """
    today = {(record.split, record.id): record for record in records}
    stale = [level for level in levels if not _is_of(level, today.get((level.split, level.id)))]
    if stale:
        first = stale[0]
        raise UserInputError(
            Problem(
                what=f"{len(stale)} of {len(levels)} memory levels belong to facts that the data has no more",
                where=str(where),
                got=f"{first.split} fact '{first.id}' is {_today(today.get((first.split, first.id)))}",
                allowed=f"{_in_words(first.relation, first.subject, first.answers)}, as it was probed",
                remedy="the data changed after the probe: put the old data back, or probe again: "
                "sftcore probe RECIPE (with another --run to keep the old levels)",
            )
        )


def _is_of(level: FactLevel, record: Record | None) -> bool:
    fact = None if record is None else fact_in(record.content)
    return fact is not None and (fact.relation, fact.subject, fact.answers) == (
        level.relation,
        level.subject,
        level.answers,
    )


def _today(record: Record | None) -> str:
    if record is None:
        return "not there"
    fact = fact_in(record.content)
    return _in_words(fact.relation, fact.subject, fact.answers) if fact else "not a fact"


def _in_words(relation: str, subject: str, answers: Sequence[str]) -> str:
    return f"{relation}, {subject}: {', '.join(answers)}"
