"""Commands that only show something: samples, the keys of a recipe, what a model says.

In: arguments. Out: `inspect` and `schema`, which cli.py lists; text on stdout.
Invariant: nothing is trained or changed (a store that is not there is prepared).
Trade-off: apart from cli.py only so that each file can be read at a sitting.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.job_commands import Overrides, RecipePath, RunFolder, load
from sftcore.config import Recipe
from sftcore.fsio import atomic_file
from sftcore.reference import recipe_reference


def inspect(
    recipe: RecipePath,
    n: Annotated[int, typer.Option(min=1, help="samples to show")] = 3,
    set_: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Print samples with trained tokens coloured, packs drawn, the first step explained."""
    loaded = load(recipe, set_, run)
    from launcher.inspection import inspect_recipe

    for line in inspect_recipe(loaded, num_samples=n, colour=sys.stdout.isatty()):
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
