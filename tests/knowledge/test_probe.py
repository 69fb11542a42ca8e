"""Hits are recounted from text; killed and resumed gives the same file; seeds are the completion's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sftcore.config import ModelSettings, ProbeSettings
from sftcore.data.contents import Fact, Pair
from sftcore.data.records import Record
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import UserInputError
from sftcore.knowledge.containment import AliasTable, contains_answer
from sftcore.knowledge.probe import (
    Prober,
    fingerprint_model,
    make_trials,
    probe_facts,
    read_levels,
    uniforms_of,
)
from sftcore.model.generate import Sampling, decode_batch
from sftcore.model.load import load_for_decoding

SETTINGS = ProbeSettings(templates=3, samples=4, max_new_tokens=6, batch_rows=16)
SEED = 11


def facts(answers=("t",)) -> list[Record]:
    """Facts whose one-letter answers a random model hits now and then."""
    content = [
        Fact(relation=r, subject=s, answers=tuple(answers))
        for r in ("P19", "P36", "P17")
        for s in ("Ann", "Bo")
    ]
    return [Record(id=f"f{i}", split="train", file="x", row=i + 1, content=c) for i, c in enumerate(content)]


@pytest.fixture
def parts(tiny_model_folder):
    model = load_for_decoding(ModelSettings(path=str(tiny_model_folder), dtype="float32"))
    return model, load_tokenizer(str(tiny_model_folder)), str(tiny_model_folder)


def run_probe(parts, run: Path, records=None):
    model, tokenizer, folder = parts
    return probe_facts(
        records or facts(),
        model,
        tokenizer,
        SETTINGS,
        seed=SEED,
        run=run,
        model_fingerprint=fingerprint_model(folder),
    )


def test_hits_equal_a_recount_prompt_by_prompt(parts, tmp_path):
    """Each completion decoded alone, without early stops, and judged on its whole text."""
    model, tokenizer, _ = parts
    answers = (" a", "the", "e", "o")
    levels = run_probe(parts, tmp_path, facts(answers))
    aliases = AliasTable.load()
    hits = np.zeros(len(levels), int)
    for trial in make_trials(facts(answers), SETTINGS):
        for sample in range(SETTINGS.samples):
            uniforms = uniforms_of(SEED, f"f{trial.fact}", trial.template, sample, count=6)[None]
            tokens = decode_batch(
                model,
                [tokenizer(trial.prompt)["input_ids"]],
                max_new_tokens=6,
                stop_ids=frozenset([0]),
                sampling=Sampling(temperature=0.7, uniforms=uniforms),
            )[0]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            hits[trial.fact] += contains_answer(text, answers, aliases)
    assert [level.hits for level in levels] == hits.tolist()
    assert 0 < hits.sum() < 12 * len(levels), "some hit, some miss"
    assert all(level.trials == 12 for level in levels)


def test_killed_and_resumed_writes_the_same_file(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path / "whole")
    done = []
    decode = Prober.hits_of

    def dies_in_the_third_batch(self, batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch)
        return decode(self, batch)

    monkeypatch.setattr(Prober, "hits_of", dies_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        run_probe(parts, tmp_path / "cut")
    partial = tmp_path / "cut" / "levels.partial.jsonl"
    assert not (tmp_path / "cut" / "levels.jsonl").exists() and partial.exists()
    with open(partial, "a") as handle:
        handle.write('{"facts": [0')  # a torn append
    again = []
    monkeypatch.setattr(Prober, "hits_of", lambda self, batch: again.append(batch) or decode(self, batch))
    run_probe(parts, tmp_path / "cut")
    assert len(again) == 5 - 2 and not any(batch in done for batch in again)
    whole, cut = ((tmp_path / name / "levels.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut and not partial.exists()


def test_levels_of_the_same_inputs_are_reused_and_of_others_are_not(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path)
    calls = []
    decode = Prober.hits_of
    monkeypatch.setattr(Prober, "hits_of", lambda self, batch: calls.append(batch) or decode(self, batch))
    run_probe(parts, tmp_path)
    assert calls == []
    run_probe(parts, tmp_path, facts(["u"]))
    assert len(calls) == 5


def test_levels_of_another_model_are_refused(parts, tmp_path):
    run_probe(parts, tmp_path)
    with pytest.raises(UserInputError, match="belong to another model"):
        read_levels(tmp_path, model_fingerprint="other")
    with pytest.raises(UserInputError, match="no memory levels yet"):
        read_levels(tmp_path / "empty", model_fingerprint="other")


def test_only_facts_of_known_relations_can_be_probed(parts, tmp_path):
    pair = Record(id="p", split="train", file="x.tsv", row=3, content=Pair(a="a", b="b", label=1))
    with pytest.raises(UserInputError, match="x.tsv:3: only facts can be probed"):
        run_probe(parts, tmp_path, [pair])
    odd = Record(
        id="p", split="train", file="x", row=3, content=Fact(relation="P0", subject="a", answers=("b",))
    )
    with pytest.raises(UserInputError, match="no wording is known for the relation 'P0'"):
        run_probe(parts, tmp_path, [odd])


def test_uniforms_belong_to_seed_fact_template_and_sample():
    keys = [(1, "a", 0, 0), (2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1)]
    drawn = [uniforms_of(*key, count=5).tolist() for key in keys]
    assert len({tuple(values) for values in drawn}) == 5
    assert uniforms_of(1, "a", 0, 0, count=5).tolist() == drawn[0]
    many = np.concatenate([uniforms_of(1, "a", 0, sample, count=50) for sample in range(200)])
    assert abs(many.mean() - 0.5) < 0.01 and many.min() >= 0 and many.max() < 1


def test_a_models_fingerprint_is_its_weights_and_configuration(tiny_model_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint_model(str(copy)) == fingerprint_model(str(tiny_model_folder))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert fingerprint_model(str(copy)) != fingerprint_model(str(tiny_model_folder))
    assert fingerprint_model("org/model") == "org/model"
