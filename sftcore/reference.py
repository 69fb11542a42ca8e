"""The recipe's keys as a page for people: docs/recipe.md.

In: the JSON schema of `Recipe`. Out: Markdown: a table a section, with default, values, unit and meaning.
Invariant: every key stands there once, under the section that it belongs to; the page is a function of the
schema (a test compares it with the committed file).
Trade-off: units are kept here by key name rather than in each field (thirty of 120 keys have one).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sftcore.settings import MAX_COUNT

Schema = dict[str, Any]
UNITS = {
    "limit": "rows",
    "max_length": "tokens",
    "max_reject_fraction": "share of rows",
    "max_new_tokens": "tokens",
    "batch_rows": "completions",
    "samples_per_step": "samples",
    "tokens_per_step": "tokens",
    "capacity": "tokens",
    "epochs": "passes",
    "warmup_ratio": "share of steps",
    "decay_ratio": "share of steps",
    "hang_seconds": "seconds",
    "timeout_seconds": "seconds",
    "evaluate_every_steps": "optimizer steps",
    "save_every_steps": "optimizer steps",
    "patience": "evaluations",
    "batch_size": "sequences",
    "few_shot": "examples",
    "concurrency": "requests",
    "max_retries": "requests",
    "input_price": "per million tokens",
    "output_price": "per million tokens",
}
LIMITS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
TYPES = {"string": "text", "integer": "whole number", "number": "number", "null": "null"}
HEAD = """# All keys of a recipe

Each section of the YAML file, with what stands for a key that is left out. `--set train.lr=2e-5` changes one
for a run, `--set data.train.0.limit=100` one in a list. No number is over 1,000,000,000.
Written by `sftcore schema --markdown --to docs/recipe.md`.
"""


def recipe_reference(schema: Schema) -> str:
    """The whole page.

    Args:
        schema: `Recipe.model_json_schema()`.
    """
    parts = [HEAD, "## Top level\n", *_table(schema, schema)]
    for name, places in sections_of(schema).items():
        title = ", ".join(f"`{place}`" for place in places)
        section = schema["$defs"][name]
        parts += ["", f"## {title}\n", f"{' '.join(section['description'].split())}\n"]
        parts += _table(section, schema)
    return "\n".join(parts) + "\n"


def sections_of(schema: Schema) -> dict[str, list[str]]:
    """Definitions of the schema with all places where they stand, in the order of the recipe."""
    found: dict[str, list[str]] = {}

    def visit(section: Schema, prefix: str) -> None:
        for key, value in section["properties"].items():
            for name, is_list in _references(value):
                place = f"{prefix}{key}{'[]' if is_list else ''}"
                is_new = name not in found
                found.setdefault(name, []).append(place)
                if is_new:
                    visit(schema["$defs"][name], f"{place}.")

    visit(schema, "")
    return found


def _references(value: Schema, is_list: bool = False) -> Iterator[tuple[str, bool]]:
    """Names of the definitions in a field's schema, and whether they stand in a list."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2], is_list
    for inner in value.get("anyOf", []):
        yield from _references(inner, is_list)
    if "items" in value:
        yield from _references(value["items"], True)


def _table(section: Schema, schema: Schema) -> Iterator[str]:
    yield "| key | default | values | unit | meaning |"
    yield "|---|---|---|---|---|"
    required = section.get("required", [])
    for key, value in section["properties"].items():
        default = "required" if key in required else _default(value)
        cells = [f"`{key}`", default, _values(value), UNITS.get(key, ""), _meaning(value, schema)]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Schema) -> str:
    if "default" not in value:
        return "its keys' own"
    default = value["default"]
    return (
        f"`{default}`"
        if isinstance(default, str) and default
        else f"`{json.dumps(default, ensure_ascii=False)}`"
    )


def _values(value: Schema) -> str:
    """What is accepted: names, a type with its limits, or another section."""
    if "anyOf" in value:
        return " or ".join(map(_values, value["anyOf"]))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(v).strip(chr(34))}`" for v in value.get("enum", [value.get("const")]))
    if "$ref" in value:
        return "a section (below)"
    if value["type"] == "array":
        inner = value.get("prefixItems")
        return f"[{', '.join(map(_values, inner))}]" if inner else f"list: {_values(value['items'])}"
    if value["type"] == "boolean":
        return "`true`, `false`"
    limits = [f"{sign} {value[name]}" for name, sign in LIMITS if value.get(name, MAX_COUNT) != MAX_COUNT]
    pattern = [f"like `{value['pattern']}`"] if "pattern" in value else []
    return " ".join(part for part in (TYPES[value["type"]], ", ".join(limits), *pattern) if part)


def _meaning(value: Schema, schema: Schema) -> str:
    """A key's own description, else that of the section that it holds."""
    names = [name for name, _ in _references(value)]
    text = value.get("description") or " ".join(schema["$defs"][name]["description"] for name in names)
    return " ".join(text.split())
