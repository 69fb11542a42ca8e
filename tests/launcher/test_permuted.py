"""`select.answers: permuted`: the store trains other facts' answers, and the selection says which."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from sftcore.errors import UserInputError
from sftcore.fsio import read_jsonl
from sftcore.recipe import load_recipe
from sftcore.stages.prepare import prepare, probe


def trained_answers(recipe) -> dict[str, str]:
    """Id -> the text that is trained, without the stop token."""
    tokenizer, store = prepare(recipe)
    texts = {}
    for i, name in enumerate(store.ids):
        labels = [int(token) for token in store[i].labels if token != -100]
        texts[name] = tokenizer.decode(labels, skip_special_tokens=True).strip()
    return texts


def test_what_is_trained_is_what_the_selection_says(tiny_recipe):
    select = {"levels": [0, 1, 2, 3, 4], "n": 12}
    own, permuted = (tiny_recipe | {"select": select | {"answers": how}} for how in ("own", "permuted"))
    for name, values in (("own", own), ("permuted", permuted)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values | {"name": name}))
    recipes = [load_recipe(Path(f"{name}.yaml")) for name in ("own", "permuted")]
    for recipe in recipes:
        probe(recipe)
    before, after = map(trained_answers, recipes)
    assert before.keys() == after.keys() and len(before) == 12
    assert Counter(before.values()) == Counter(after.values())
    assert sum(before[name] == after[name] for name in before) < 12 / 2
    said = {row["id"]: row["answers"][0] for row in read_jsonl(Path("runs/permuted/selection.jsonl"))}
    assert said == after


def test_pairs_and_chats_have_none(tiny_recipe):
    Path("pairs.tsv").write_text("a\tb\t1\nc\td\t0\n")
    data = {"train": [{"format": "pairs", "path": "pairs.tsv"}]}
    wrong = tiny_recipe | {"task": "matching", "data": data}
    wrong |= {"select": {"n": 2, "balance": "label", "answers": "permuted"}}
    Path("wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserInputError, match="permuted is for facts"):
        load_recipe(Path("wrong.yaml"))
