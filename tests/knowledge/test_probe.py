"""Hits are recounted from text; killed and resumed gives the same file; seeds are the completion's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from sftcore.config import ModelSettings, ProbeSettings
from sftcore.data.contents import Fact, Pair
from sftcore.data.records import Record
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import UserInputError
from sftcore.generate.api import Decoding
from sftcore.generate.decode import decode_batch
from sftcore.generate.own import OwnGenerator
from sftcore.knowledge.containment import AliasTable, AnswerMatcher
from sftcore.knowledge.level_files import is_probed
from sftcore.knowledge.probe import (
    PARTIAL,
    Probe,
    Prober,
    probe_facts,
    probe_shard,
    read_levels,
    uniforms_of,
)
from sftcore.knowledge.questions import make_trials
from sftcore.model.identity import fingerprint_model
from sftcore.model.load import load_for_decoding
from sftcore.shares import Share

SETTINGS = ProbeSettings(templates=3, samples=4, max_new_tokens=6, batch_rows=16)
SEED = 11
FILES = ("levels.jsonl", "levels.templates.json", "levels.manifest.json")


def facts(answers=("t",), subjects=("Ann", "Bo")) -> list[Record]:
    """Facts whose one-letter answers a random model hits now and then."""
    content = [
        Fact(relation=r, subject=s, answers=tuple(answers)) for r in ("P19", "P36", "P17") for s in subjects
    ]
    return [Record(id=f"f{i}", split="train", file="x", row=i + 1, content=c) for i, c in enumerate(content)]


@pytest.fixture
def parts(tiny_model_folder):
    model = load_for_decoding(ModelSettings(path=str(tiny_model_folder), dtype="float32"))
    return model, load_tokenizer(str(tiny_model_folder)), str(tiny_model_folder)


def make_probe(parts, records=None, settings=SETTINGS, dtype="float32") -> Probe:
    _, tokenizer, folder = parts
    return Probe(
        records=records or facts(),
        tokenizer=tokenizer,
        settings=settings,
        seed=SEED,
        model_fingerprint=fingerprint_model(folder),
        dtype=dtype,
    )


def run_probe(parts, run: Path, records=None, settings=SETTINGS, **options):
    return probe_facts(
        make_probe(parts, records, settings), lambda: OwnGenerator(*parts[:2]), run=run, **options
    )


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


def count_batches(monkeypatch) -> list:
    """The batches that are decoded from now on."""
    decoded = []
    count = Prober.count_hits

    def counted(self, model, batch):
        decoded.append(list(batch))
        return count(self, model, batch)

    monkeypatch.setattr(Prober, "count_hits", counted)
    return decoded


def test_hits_equal_a_recount_prompt_by_prompt(parts, tmp_path):
    """Each completion decoded alone, without early stops, and judged on its whole text."""
    model, tokenizer, _ = parts
    answers = (" a", "the", "e", "o")
    levels = run_probe(parts, tmp_path, facts(answers))
    aliases = AliasTable.load()
    hits = np.zeros((len(levels), SETTINGS.templates), int)
    for trial in make_trials(facts(answers), SETTINGS.templates):
        for sample in range(SETTINGS.samples):
            uniforms = uniforms_of(SEED, trial.prompt, sample, count=6)[None]
            tokens = decode_batch(
                model,
                [tokenizer(trial.prompt)["input_ids"]],
                Decoding(max_new_tokens=6, stop_ids=frozenset([0]), temperature=0.7, uniforms=uniforms),
            )[0]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            hits[trial.fact, trial.template] += AnswerMatcher(answers, aliases).matches(text)
    assert [level.hits for level in levels] == hits.sum(1).tolist()
    assert 0 < hits.sum() < 12 * len(levels), "some hit, some miss"
    assert all(level.trials == 12 for level in levels)
    by_template = json.loads((tmp_path / "levels.templates.json").read_text())
    assert by_template == {
        relation: hits[2 * i : 2 * i + 2].sum(0).tolist() for i, relation in enumerate(("P19", "P36", "P17"))
    }


def test_facts_with_the_same_prompt_are_asked_once_and_judged_apart(parts, tmp_path, monkeypatch):
    records = [*facts(["t"]), *facts(["e", "o"])]
    records = [replace(record, id=f"f{i}") for i, record in enumerate(records)]
    decoded = count_batches(monkeypatch)
    together = run_probe(parts, tmp_path / "both", records)
    assert sum(map(len, decoded)) == 6 * SETTINGS.templates, "12 facts, 6 distinct questions"
    first = run_probe(parts, tmp_path / "first", records[:6])
    second = run_probe(parts, tmp_path / "second", records[6:])
    assert [level.hits for level in together] == [level.hits for level in [*first, *second]]
    assert [level.hits for level in first] != [level.hits for level in second]


def test_killed_and_resumed_writes_the_same_file(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path / "whole")
    done = []
    count = Prober.count_hits

    def dies_in_the_third_batch(self, model, batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(list(batch))
        return count(self, model, batch)

    monkeypatch.setattr(Prober, "count_hits", dies_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        run_probe(parts, tmp_path / "cut")
    partial = tmp_path / "cut" / PARTIAL
    assert not (tmp_path / "cut" / "levels.jsonl").exists() and partial.exists()
    with open(partial, "a") as handle:
        handle.write('{"batch": 2')  # a torn append
    monkeypatch.setattr(Prober, "count_hits", count)
    again = count_batches(monkeypatch)
    run_probe(parts, tmp_path / "cut")
    assert len(again) == 5 - 2 and not any(batch in done for batch in again)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut") and not partial.exists()


def test_shards_give_the_same_files_as_one_probe(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path / "whole")
    run, probe = tmp_path / "shards", make_probe(parts)
    done = [
        probe_shard(probe, lambda: OwnGenerator(*parts[:2]), run=run, share=Share(job, 2)) for job in (0, 1)
    ]
    assert done == [(3, 5), (2, 5)]
    decoded = count_batches(monkeypatch)
    run_probe(parts, run, merge_only=True)
    assert decoded == [] and contents(run) == contents(tmp_path / "whole")


def test_merging_waits_for_every_shard_and_a_plain_probe_measures_the_rest(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path / "whole")
    run = tmp_path / "shards"
    for _ in range(2):  # the second time there is nothing left to do
        probe_shard(make_probe(parts), lambda: OwnGenerator(*parts[:2]), run=run, share=Share(0, 2))
    assert (run / "shards" / "0-of-2" / PARTIAL).is_file()
    with pytest.raises(UserInputError, match="2 of 5 batches were not probed yet"):
        run_probe(parts, run, merge_only=True)
    decoded = count_batches(monkeypatch)
    run_probe(parts, run)
    assert len(decoded) == 2 and contents(run) == contents(tmp_path / "whole")


def test_shards_of_another_probe_do_not_count(parts, tmp_path):
    probe_shard(
        make_probe(parts, facts(["u"])), lambda: OwnGenerator(*parts[:2]), run=tmp_path, share=Share(0, 1)
    )
    with pytest.raises(UserInputError, match="5 of 5 batches were not probed yet"):
        run_probe(parts, tmp_path, merge_only=True)


def test_levels_of_the_same_inputs_are_reused_and_of_others_are_not(parts, tmp_path, monkeypatch):
    run_probe(parts, tmp_path)
    decoded = count_batches(monkeypatch)
    run_probe(parts, tmp_path)
    assert decoded == []
    run_probe(parts, tmp_path, facts(["u"]))
    assert len(decoded) == 5


def test_levels_of_another_model_are_refused(parts, tmp_path):
    run_probe(parts, tmp_path)
    with pytest.raises(UserInputError, match="belong to another model"):
        read_levels(tmp_path, model_fingerprint="other", dtype="float32")
    with pytest.raises(UserInputError, match="no memory levels yet"):
        read_levels(tmp_path / "empty", model_fingerprint="other", dtype="float32")


def test_levels_depend_on_the_dtype(parts, tmp_path):
    run_probe(parts, tmp_path)
    assert is_probed(tmp_path, make_probe(parts).manifest())
    assert not is_probed(tmp_path, make_probe(parts, dtype="bfloat16").manifest())


def test_only_facts_of_known_relations_can_be_probed(parts, tmp_path):
    pair = Record(id="p", split="train", file="x.tsv", row=3, content=Pair(a="a", b="b", label=1))
    with pytest.raises(UserInputError, match="x.tsv:3: only facts can be probed"):
        run_probe(parts, tmp_path, [pair])
    odd = Record(
        id="p", split="train", file="x", row=3, content=Fact(relation="P0", subject="a", answers=("b",))
    )
    with pytest.raises(UserInputError, match="no wording is known for the relation 'P0'"):
        run_probe(parts, tmp_path, [odd])


def test_prompts_never_end_with_what_the_tokenizer_puts_after_a_text(parts):
    model, _, folder = parts
    tokenizer = load_tokenizer(folder)
    before = Prober.of(make_probe(parts)).prompts
    ending = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("Ann")["input_ids"][-1] == tokenizer.eos_token_id
    assert Prober.of(make_probe((model, tokenizer, folder))).prompts == before


def test_uniforms_belong_to_seed_prompt_and_sample():
    keys = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    drawn = [uniforms_of(*key, count=5).tolist() for key in keys]
    assert len({tuple(values) for values in drawn}) == 4
    assert uniforms_of(1, "a", 0, count=5).tolist() == drawn[0]
    many = np.concatenate([uniforms_of(1, "a", sample, count=50) for sample in range(200)])
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
