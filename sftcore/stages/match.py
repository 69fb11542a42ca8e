"""`sftcore match`: a trained model and a file of pairs -> a score for each pair.

In: a model folder that `sftcore train` wrote for text matching, a TSV, CSV or JSONL file of pairs. Out: a
JSONL file: row, both texts, label, score.
Invariant: prompts, label words and mode are those of training (matching.json in the folder); each row of the
file is in the output or in the ledger next to it.
Trade-off: all pairs are held in memory (about 1 kB each), so that they can be packed by length, and written
at the end, whole; cut a file of 10 million into parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.data.ledger import REMEDIES, Change, Ledger, Reason
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record, read_unlabelled
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.pairs import Verdict, judge_pairs, reject_overlong
from sftcore.fsio import read_json, write_jsonl
from sftcore.model.adapters import is_adapter
from sftcore.run_recipe import RECIPE
from sftcore.settings import MATCHING_FILE
from sftcore.sources import PRESETS, Columns
from sftcore.tasks.kinds.pair import pair_in
from sftcore.wrong_values import misfits

log = logging.getLogger("sftcore.matching")
RESULTS = ("model", "adapter")  # of a run
COLUMNS_REMEDY = "give --a and --b: header names or 0-based numbers"
GOT_CHARACTERS = 400  # of an error that quotes a file


def match_pairs(
    folder: Path,
    pairs: Path,
    to: Path,
    *,
    columns: tuple[str | None, str | None] = (None, None),
    overwrite: bool = False,
) -> int:
    """Score the pairs of a file; returns their number.

    Args:
        folder: RUN, its model or adapter folder, or a copy of that.
        to: JSONL file to write; rejected rows go to TO.ledger.jsonl.
        columns: of the two texts, names or 0-based numbers; None: as in training, or as known corpora have
            them.

    Raises:
        UserInputError: no such model or file, or no usable pair in it.
    """
    folder = model_of(folder)
    recipe = recipe_of(folder)
    _check_free(to, pairs, overwrite=overwrite)
    ledger = Ledger()
    layouts = layouts_of(recipe, columns)
    found = read_unlabelled(pairs, layouts, labels=recipe.matching.labels, ledger=ledger)
    records = list(ledger.take(found))
    prompter = Prompter(PromptOptions.of(recipe), load_tokenizer(str(folder)))
    records = reject_overlong(recipe, str(folder.resolve()), records, prompter, ledger)
    if not records:
        raise UserInputError(_no_pair(pairs, ledger))
    if ledger.altered_by_reason[Change.HEADER_ABSENT]:
        log.warning("%s has no header: its first line is taken for a pair", pairs)
    quantised = recipe.adapter.kind == "qlora" and is_adapter(folder)
    verdicts = judge_pairs(recipe, str(folder.resolve()), records, prompter, quantised=quantised)
    write_jsonl(to, _rows(records, verdicts))
    _write_ledger(ledger, _ledger_of(to))
    return len(records)


def _ledger_of(to: Path) -> Path:
    return Path(f"{to}.ledger.jsonl")


def _check_free(to: Path, pairs: Path, *, overwrite: bool) -> None:
    """Refuse to write over the pairs or a folder, and over anything without being asked to."""
    remedy = "give another --to"
    if to.is_dir() or to.resolve() == pairs.resolve():
        what = "this is a folder" if to.is_dir() else "this is the file of the pairs itself"
        raise UserInputError(Problem(what=what, where=str(to), remedy=remedy))
    there = [] if overwrite else [path for path in (to, _ledger_of(to)) if path.exists()]
    if there:
        remedy += ", or --overwrite"
        raise UserInputError(*(Problem(what="is there already", where=str(p), remedy=remedy) for p in there))


def _write_ledger(ledger: Ledger, path: Path) -> None:
    """List what was rejected and what was noted, if anything was, and say so."""
    path.unlink(missing_ok=True)  # of an earlier call
    if ledger.num_rejected or ledger.altered_by_reason:
        ledger.write(path)
    if ledger.num_rejected:
        log.warning("%s can't be used, as listed in %s", counted(ledger.num_rejected, "row"), path)
    if notes := ", ".join(f"{change} {count}" for change, count in ledger.altered_by_reason.items()):
        log.info("notes: %s (%s)", notes, path)


def layouts_of(recipe: Recipe, columns: tuple[str | None, str | None] = (None, None)) -> list[Columns]:
    """Where the two texts may stand: as the user says; else as in training, then as known corpora have them.

    >>> columns = layouts_of(Recipe.model_construct(), ("2", "text b"))
    >>> [(one.a, one.b) for one in columns]
    [(2, 'text b')]
    """
    named = {field: _place(text) for field, text in zip("ab", columns, strict=True) if text is not None}
    if named:
        return [Columns.model_validate(named)]
    trained = [source.columns for source in recipe.data.train]
    return [*trained, Columns(), *(Columns.model_validate(names) for names in PRESETS.values())]


def _place(text: str) -> str | int:
    """A column's name, or its 0-based number."""
    return int(text) if text.isdecimal() else text


def model_of(folder: Path) -> Path:
    """The folder of a run's model, or the folder itself.

    Raises:
        UserInputError: the run has no result yet.
    """
    if not (folder / RECIPE).is_file() or (folder / MATCHING_FILE).is_file():
        return folder
    found = [folder / name for name in RESULTS if (folder / name).is_dir()]
    if not found:
        remedy = "finish it: sftcore train RUN"
        raise UserInputError(Problem(what="this run has no result yet", where=str(folder), remedy=remedy))
    return found[0]


def recipe_of(folder: Path) -> Recipe:
    """What the folder's model was trained for, as a recipe.

    Raises:
        UserInputError: not a folder of a matching run.
    """
    path = folder / MATCHING_FILE
    if not path.is_file():
        remedy = "give a run with task: matching, its model or adapter folder, or `sftcore export` of it"
        raise UserInputError(
            Problem(
                what=f"no model for text matching here (no {MATCHING_FILE})", where=str(folder), remedy=remedy
            )
        )
    values = read_json(path)
    try:
        return Recipe.model_validate(values | {"model": values["model"] | {"path": str(folder.resolve())}})
    except (KeyError, TypeError, ValidationError) as error:
        what, remedy = "not as this version writes it", "fix the file, or train the model again"
        got = _in_words(error)[:GOT_CHARACTERS]
        raise UserInputError(Problem(what=what, where=str(path), got=got, remedy=remedy)) from error


def _in_words(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"no key {error}" if isinstance(error, KeyError) else "a section that is no mapping"
    return "; ".join(
        f"{'.'.join(map(str, found.location))}: {found.what} ({found.got})"
        for found in misfits(error.errors())
    )


def _rows(records: list[Record], verdicts: list[Verdict | None]) -> Iterator[dict[str, Any]]:
    for record, verdict in zip(records, verdicts, strict=True):
        pair = pair_in(record.content)
        assert verdict is not None
        texts = {"row": record.row, "sentence1": pair.a, "sentence2": pair.b}
        yield {**texts, "label": verdict.label, "score": verdict.score, "text": verdict.text}


def _no_pair(pairs: Path, ledger: Ledger) -> Problem:
    rejected = [entry for entry in ledger.entries() if entry["kind"] == "rejected"]
    if not rejected:
        remedy = "give a file with a pair in each row"
        return Problem(what="no pair in this file", where=str(pairs), remedy=remedy)
    got = "; ".join(f"row {entry['row']}: {entry['reason']}" for entry in rejected[:3])
    remedies = [_REMEDIES[reason] for reason in _REMEDIES if ledger.rejected_by_reason[reason]]
    remedy = "; ".join(dict.fromkeys(remedies)) or "fix these rows"
    return Problem(what="no usable pair", where=str(pairs), got=got, remedy=remedy)


_REMEDIES = {
    Reason.MISSING_FIELD: COLUMNS_REMEDY,
    Reason.LABEL_AS_TEXT: COLUMNS_REMEDY,
    Reason.UNDECODABLE_BYTES: REMEDIES[Reason.UNDECODABLE_BYTES],
    Reason.WRONG_FIELD_COUNT: REMEDIES[Reason.WRONG_FIELD_COUNT],
    Reason.OVERLENGTH: "shorten the texts: the model takes no longer ones",
}
