"""Drift equals the formula written out; examples are spread over relations."""

from __future__ import annotations

import math

import pytest
import torch

from sftcore.data.contents import Fact
from sftcore.data.records import Record
from sftcore.errors import UserInputError
from sftcore.evaluate.drift import drift, drift_prompts, summarise_drift
from sftcore.evaluate.few_shot import choose_examples
from sftcore.knowledge.templates import load_relations


def record(number: int, relation: str) -> Record:
    content = Fact(relation=relation, subject=f"S{number}", answers=("x",))
    return Record(id=f"f{number}", split="test", file="x", row=number, content=content)


def test_drift_is_the_divergence_over_the_tuned_models_ten_likeliest():
    torch.manual_seed(0)
    tuned, base = torch.randn(3, 50) * 3, torch.randn(3, 50)
    for row, found in enumerate(drift(tuned, base)):
        ids = sorted(range(50), key=lambda i: -tuned[row, i])[:10]
        p, q = ([math.exp(t[row, i]) for i in ids] for t in (tuned, base))
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found == pytest.approx(expected, rel=1e-4) and found > 0
    assert drift(tuned, tuned) == [0.0, 0.0, 0.0]


def test_each_fact_is_asked_in_its_relations_best_wording():
    relations = load_relations()
    prompts = drift_prompts([record(1, "P17"), record(2, "P36")], {"P17": 3, "P36": 0}, relations)
    expected = [relations[r].completions[i] for r, i in (("P17", 3), ("P36", 0))]
    assert prompts == [text.replace("{subject}", f"S{n}") for n, text in enumerate(expected, start=1)]


def test_drift_is_summed_up_by_relation():
    found = summarise_drift([record(1, "P17"), record(2, "P36"), record(3, "P17")], [1.0, 2.0, 3.0], level=2)
    assert found["level"] == 2 and found["n"] == 3 and found["mean_kl_nats"] == 2.0
    assert found["by_relation"]["P17"] == {"n": 2, "mean_kl_nats": 2.0}


def test_examples_are_of_different_relations_and_the_same_every_time():
    records = [record(i, "P17" if i < 8 else "P36") for i in range(10)]
    chosen = choose_examples(records, 4, seed=1)
    relations = [r.content.relation for r in chosen]
    assert sorted(relations[:2]) == sorted(relations[2:]) == ["P17", "P36"]
    assert chosen == choose_examples(records[::-1], 4, seed=1) != choose_examples(records, 4, seed=2)
    with pytest.raises(UserInputError, match="too few training records for the examples"):
        choose_examples(records, 11, seed=1)
