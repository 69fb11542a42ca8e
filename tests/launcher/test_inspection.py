"""`sftcore inspect`: samples as text, token by token."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from launcher_commands import save
from tiny import write_lines

from sftcore.planning.inspection import inspect_recipe
from sftcore.recipe import load_recipe
from sftcore.stages.prepare import prepare


def test_each_token_has_a_line_with_its_id(tiny_recipe):
    recipe = load_recipe(Path(save(tiny_recipe)))
    lines = list(inspect_recipe(recipe, num_samples=1, colour=False, with_ids=True))
    tokenizer, store = prepare(recipe)
    name = next(line for line in lines if line.startswith("sample ")).split()[1].rstrip(":")
    sample = store[store.ids.index(name)]
    found = [re.fullmatch(r" +(\d+) +(\d+)  (\[?)(.*?)(\]?)", line) for line in lines]
    tokens = [match for match in found if match]
    assert [int(match[2]) for match in tokens] == sample.input_ids.tolist()
    assert [int(match[1]) for match in tokens] == list(range(len(tokens)))
    trained = [int(match[2]) for match in tokens if match[3] and match[5]]
    assert trained == [label for label in sample.labels.tolist() if label != -100]
    assert 0 < len(trained) < len(tokens) and tokens[-1][4] == "'<eos>'"
    assert len(list(inspect_recipe(recipe, num_samples=1, colour=False))) == len(lines) - len(tokens)


def test_a_sample_cannot_colour_the_terminal(tiny_recipe):
    write_lines(Path("c.jsonl"), [{"prompt": "\x1b[31mred\x07", "completion": "x\x9by"}])
    tiny_recipe["data"] = {"train": [{"format": "jsonl", "path": "c.jsonl"}]}
    shown = "".join(inspect_recipe(load_recipe(Path(save(tiny_recipe))), num_samples=1, colour=False))
    assert "\\x1b[31mred\\x07" in shown and not re.search(r"[\x00-\x1f\x7f-\x9f]", shown.replace("\n", ""))


def test_spaces_of_sentencepiece_are_shown():
    import numpy as np
    from tiny_tokenizers import build_spaces_in_front

    from sftcore.planning.inspection import _token_lines, marked_text

    tokenizer = build_spaces_in_front()
    ids = tokenizer("Paris is Paris")["input_ids"]
    labels = np.array([-100] * (len(ids) - 2) + [ids[-1], -100])
    sample = SimpleNamespace(input_ids=np.array(ids), labels=labels, extra={})
    assert marked_text(sample, tokenizer, ("[", "]")) == "<s> Paris is[ Paris]"
    assert [line.split(maxsplit=2)[2] for line in _token_lines(sample, tokenizer, ("[", "]"))][1:] == [
        "' Paris'",
        "' is'",
        "[' Paris']",
    ]
