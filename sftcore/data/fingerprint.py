"""What decides a store's samples, as one short hash: the cache key.

In: a recipe, a tokenizer. Out: 16 hex digits.
Invariant: contents count, never names of folders or times; a changed template, tokenizer, option, file or
version of this code gives another key, and nothing else does: how many rows may be dropped is no part of it.
Trade-off: every source file is read for its checksum (1 GB/s) the first time, and remembered after that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from sftcore.config import DataSettings, Recipe
from sftcore.data.arrow import identity_of
from sftcore.data.prompts import PromptOptions, question_patterns
from sftcore.data.splits import HELD_OUT, sources_of, split_prefixes
from sftcore.data.tokens import Tokenizer, tokenizer_identity
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of, sha256_of_file
from sftcore.recipe import source_files
from sftcore.tasks import TASKS

CODE_VERSION = 9  # raise it when the same inputs give other samples, or other parts
Digest = Callable[[Path], str]
Wanted = Mapping[str, tuple[str, ...] | None]  # id -> answers to train, None: its own


def as_wanted(only_ids: Collection[str] | None) -> Wanted | None:
    """Records to train on, as a mapping; None: all."""
    return only_ids if only_ids is None or isinstance(only_ids, Mapping) else dict.fromkeys(only_ids)


def store_fingerprint(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    only_ids: Collection[str] | None = None,
    digest: Digest = sha256_of_file,
) -> str:
    """Hash of everything that decides the samples: file contents, template, tokenizer, options, code."""
    data = recipe.data
    problems: list[Problem] = []
    sources = {split: _sources_identity(data, split, digest, problems) for split in ("train", *HELD_OUT)}
    if problems:
        raise UserInputError(*problems)
    return fingerprint_of(
        {
            "code": CODE_VERSION,
            "sources": sources,
            "prompts": PromptOptions.of(recipe).identity(),
            "patterns": question_patterns(data.relations) if TASKS[recipe.task].has_facts else None,
            "deduplicate": data.deduplicate,
            "tokenizer": tokenizer_identity(tokenizer),
            "only_ids": None if only_ids is None else sorted(set(only_ids)),
            **_other_answers(as_wanted(only_ids) or {}),
        }
    )


def _other_answers(wanted: Wanted) -> dict[str, Any]:
    """Answers that are trained instead of the records' own; nothing where all are their own."""
    found = {id: list(answers) for id, answers in sorted(wanted.items()) if answers is not None}
    return {"answers": found} if found else {}


def _sources_identity(
    data: DataSettings, split: str, digest: Digest, problems: list[Problem]
) -> list[dict[str, Any]]:
    prefixes = split_prefixes(data, split)
    identities = []
    for source in sources_of(data, split):
        files = []
        for file in source_files(source):
            try:
                files.append([prefixes[file], identity_of(source, file, digest)])
            except UserInputError as error:
                problems += error.problems
        identities.append(
            {
                "format": source.format,
                "limit": source.limit,
                "quotes": source.quotes,
                "columns": source.columns.model_dump(),
                "files": files,
            }
        )
    return identities
