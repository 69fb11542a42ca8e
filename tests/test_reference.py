"""docs/recipe.md is current, whole, and says something of every key."""

from __future__ import annotations

import re
from pathlib import Path

from sftcore.config import Recipe
from sftcore.reference import UNITS, recipe_reference, sections_of

ROOT = Path(__file__).parent.parent
SCHEMA = Recipe.model_json_schema()


def properties():
    """(place, key, schema) of every key."""
    places = {name: found[0] for name, found in sections_of(SCHEMA).items()}
    sections = [("", SCHEMA), *((place, SCHEMA["$defs"][name]) for name, place in places.items())]
    return [
        (place, key, value) for place, section in sections for key, value in section["properties"].items()
    ]


def test_the_committed_page_is_current():
    remedy = "run: sftcore schema --markdown --to docs/recipe.md"
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == recipe_reference(SCHEMA), remedy


def test_every_key_stands_in_its_section_once():
    parts = re.split("^## ", recipe_reference(SCHEMA), flags=re.M)[1:]
    keys = {part.split("\n")[0]: re.findall(r"^\| `(\w+)` \|", part, flags=re.M) for part in parts}
    assert len(keys["`train`"]) == len(set(keys["`train`"])) and "hang_seconds" in keys["`train`"]
    assert "`data.train[]`, `data.valid[]`, `data.test[]`, `data.ood[]`" in keys
    assert sum(map(len, keys.values())) == len(properties()) > 100


def test_every_key_has_a_description_and_every_unit_a_key():
    holds_section = ("$ref", "anyOf", "items")
    bare = [
        f"{place}.{key}"
        for place, key, value in properties()
        if not value.get("description") and not any(name in value for name in holds_section)
    ]
    assert bare == []
    assert UNITS.keys() <= {key for _, key, _ in properties()}


def test_values_are_said_with_their_limits():
    page = recipe_reference(SCHEMA)
    assert (
        "| `lr` | `auto` | number > 0 or `auto` |  | peak learning rate; auto: 1e-05, with an adapter 0.0002"
        in page
    )
    assert "| `capacity` | `4096` | whole number > 0 | tokens | tokens in a pack at most |" in page
    assert "| `max_length` | `null` | whole number > 0 or null | tokens |" in page
    assert "| `scheduler` | `cosine` | `cosine`, `linear`, `constant`, `wsd` |" in page
    assert "| `dropout` | `0.0` | number >= 0, < 1 |" in page
    assert "| `path` | required | text |" in page
    assert '| `zh` | `["不同", "相同"]` | [text, text] |' in page and "KL(tuned \\|\\| base)" in page
