"""Commands that only show something: samples, the keys of a recipe, what a model says.

In: arguments. Out: `inspect`, `schema` and `generate`, which cli.py lists; text on stdout.
Invariant: nothing is trained or changed (a store that is not there is prepared).
Trade-off: apart from cli.py only so that each file can be read at a sitting.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from sftcore.config import Recipe
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file
from sftcore.launcher.job_commands import load
from sftcore.launcher.options import Changes, RecipePath
from sftcore.reference import recipe_reference
from sftcore.runs.given import require_folder
from sftcore.settings import LOWEST_TEMPERATURE, MAX_COUNT


def inspect(
    recipe: RecipePath,
    n: Annotated[int, typer.Option(min=1, help="samples to show")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="every token with its id, those of prompts too")] = False,
    *,
    changes: Changes,
) -> None:
    """Print samples with trained tokens coloured, packs drawn, the first step explained."""
    loaded = load(recipe, changes.set_, changes.run)
    from sftcore.planning.inspection import inspect_recipe

    for line in inspect_recipe(loaded, num_samples=n, colour=sys.stdout.isatty(), with_ids=ids):
        print(line)


def schema(
    to: Annotated[Path | None, typer.Option(help="write it to this file instead of printing it")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="tables for people instead: docs/recipe.md")
    ] = False,
) -> None:
    """The JSON schema of a recipe, for editors and checks; or its keys in tables, for people."""
    found = Recipe.model_json_schema()
    text = recipe_reference(found) if markdown else json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if to is None:
        print(text, end="")
        return
    with atomic_file(to) as handle:
        handle.write(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How completions are made."""

    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="tokens of a completion")] = 128
    temperature: Annotated[float, typer.Option(min=0, max=MAX_COUNT, help="0: greedy")] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="of the draws at a temperature")] = 17
    verbatim: Annotated[
        bool, typer.Option("--verbatim", help="put texts into no template of the run or model")
    ] = False


def generate(
    folder: Annotated[Path, typer.Argument(help="run folder, or model folder", metavar="MODEL_OR_RUN")],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="question, user's turn or prompt")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="rows with prompt, question or messages")
    ] = None,
    *,
    decoding: Decoding,
) -> None:
    """Complete prompts in the form in which the run was trained; a text, or JSON lines for a file."""
    if 0 < decoding.temperature < LOWEST_TEMPERATURE:
        what = f"a temperature is 0 (greedy) or at least {LOWEST_TEMPERATURE}"
        raise UserInputError(Problem(what=what, where="--temperature", got=f"{decoding.temperature:g}"))
    if (prompt is None) == (file is None):
        raise UserInputError(Problem(what="give exactly one of --prompt and --file", where="generate"))
    require_folder(folder, "generate")
    from sftcore.stages.generate import Settings, generate_rows, generate_text

    settings = Settings(**asdict(decoding))
    if prompt is not None:
        print(generate_text(folder, prompt, settings))
        return
    assert file is not None
    for row in generate_rows(folder, file, settings):
        print(json.dumps(row, ensure_ascii=False))
