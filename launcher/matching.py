"""`sftcore match`: a trained model and a file of pairs -> a score for each pair.

In: a model folder that `sftcore train` wrote for text matching, a TSV, CSV or JSONL file of pairs. Out: a
JSONL file: row, both texts, label, score.
Invariant: prompts, label words and mode are those of training (matching.json in the folder); each row of the
file is in the output or in the ledger beside it.
Trade-off: all pairs are held in memory (about 1 kB each), so that they can be packed by length, and written
at the end, whole; cut a file of 10 million into parts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.data.contents import Pair
from sftcore.data.ledger import Ledger
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record, read_unlabelled
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.pairs import Verdict, judge_pairs
from sftcore.fsio import read_json, write_jsonl
from sftcore.model.adapters import is_adapter
from sftcore.train.export import MATCHING_FILE

log = logging.getLogger("sftcore.matching")


def match_pairs(folder: Path, pairs: Path, to: Path, *, columns: tuple[str, str]) -> int:
    """Score the pairs of a file; returns their number.

    Args:
        folder: RUN/model or RUN/adapter, or a copy of it.
        to: JSONL file to write; rejected rows go to TO.ledger.jsonl.
        columns: names of the two text columns.

    Raises:
        UserInputError: no such model or file, or no usable pair in it.
    """
    recipe = recipe_of(folder)
    ledger = Ledger()
    records = list(ledger.take(read_unlabelled(pairs, columns, ledger)))
    if not records:
        raise UserInputError(Problem(what="no usable pair", where=str(pairs), got=_first_rejections(ledger)))
    prompter = Prompter(PromptOptions.of(recipe), load_tokenizer(str(folder)))
    quantised = recipe.adapter.kind == "qlora" and is_adapter(folder)
    verdicts = judge_pairs(recipe, str(folder.resolve()), records, prompter, quantised=quantised)
    write_jsonl(to, _rows(records, verdicts))
    if ledger.num_rejected:
        listed = to.with_name(to.name + ".ledger.jsonl")
        ledger.write(listed)
        log.warning("%d rows can't be used; they are listed in %s", ledger.num_rejected, listed)
    return len(records)


def recipe_of(folder: Path) -> Recipe:
    """What the folder's model was trained for, as a recipe.

    Raises:
        UserInputError: not a folder of a matching run.
    """
    path = folder / MATCHING_FILE
    if not path.is_file():
        remedy = "give RUN/model or RUN/adapter of a run with task: matching, or `sftcore export` of it"
        raise UserInputError(
            Problem(
                what=f"no model for text matching here (no {MATCHING_FILE})", where=str(folder), remedy=remedy
            )
        )
    values = read_json(path)
    values["model"]["path"] = str(folder.resolve())
    return Recipe.model_validate(values)


def _rows(records: list[Record], verdicts: list[Verdict | None]) -> Iterator[dict[str, Any]]:
    for record, verdict in zip(records, verdicts, strict=True):
        assert isinstance(record.content, Pair) and verdict is not None
        texts = {"row": record.row, "sentence1": record.content.a, "sentence2": record.content.b}
        yield {**texts, "label": verdict.label, "score": verdict.score, "text": verdict.text}


def _first_rejections(ledger: Ledger) -> str:
    rejected = [entry for entry in ledger.entries() if entry["kind"] == "rejected"]
    return "; ".join(f"row {entry['row']}: {entry['reason']}" for entry in rejected[:3])
