"""Likelihoods equal products of tempered probabilities, and shares of samples that begin with the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TOWNS
from tiny_tokenizers import build_bpe, build_spaces_in_front

from sftcore.config import ModelSettings, ProbeSettings
from sftcore.data.contents import Fact
from sftcore.data.records import Record
from sftcore.data.tokens import codec_of, load_tokenizer
from sftcore.generate.api import Decoding
from sftcore.generate.decode import decode_batch
from sftcore.generate.own import OwnGenerator
from sftcore.knowledge.containment import AliasTable, AnswerMatcher
from sftcore.knowledge.likelihood import _spellings, accepted_names, answer_likelihoods
from sftcore.knowledge.probe import Probe, probe_facts
from sftcore.knowledge.written_forms import written_forms
from sftcore.model.identity import fingerprint_model
from sftcore.model.load import load_for_decoding


@pytest.fixture(scope="module")
def parts(tiny_model_folder):
    model = load_for_decoding(ModelSettings(path=str(tiny_model_folder), dtype="float32"))
    return model, load_tokenizer(str(tiny_model_folder))


def coded(parts):
    return OwnGenerator(*parts), codec_of(parts[1])


def chance_by_hand(model, tokenizer, prompt: str, name: str) -> float:
    """Token after token, each on the whole text before it."""
    ids, chance = tokenizer(prompt)["input_ids"], 1.0
    for token in tokenizer(f" {name}")["input_ids"]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        chance *= torch.softmax(logits.double() / 0.7, -1)[token].item()
        ids = [*ids, token]
    return chance


@torch.inference_mode()
def test_likelihood_is_the_sum_of_the_names_chances(parts):
    prompts = ["Ann was born in", "Bob was", "Hal was born in the town of"]
    names = [["Rome", "Oslo"], ["Lima"], ["Rome", "Romeo"]]  # "Romeo" begins with "Rome": it adds nothing
    found = answer_likelihoods(*coded(parts), prompts, names, temperature=0.7, max_new_tokens=8)
    counted = [["Rome", "Oslo"], ["Lima"], ["Rome"]]
    for prompt, own, chance in zip(prompts, counted, found, strict=True):
        expected = sum(chance_by_hand(*parts, prompt, name) for name in own)
        assert chance == pytest.approx(expected, rel=1e-4)  # float32
    assert min(found) > 0


def test_names_that_do_not_fit_count_nothing(parts):
    assert answer_likelihoods(
        *coded(parts), ["Ann"], [["Xyzzyxyzzy"]], temperature=0.7, max_new_tokens=2
    ) == [0.0]


def test_a_spelling_that_begins_with_another_is_left_out(parts):
    rome = tuple(parts[1](" Rome")["input_ids"])
    assert _spellings(codec_of(parts[1]), ["It is"], [["Romeo", "Rome", "Rome"]], 8) == [[rome]]


def test_no_space_stands_between_unspaced_scripts():
    tokenizer = build_bpe()
    found = _spellings(codec_of(tokenizer), ["中国的首都是", "Its capital is"], [["北京"], ["北京"]], 32)
    bare, spaced = (tuple(tokenizer(text)["input_ids"]) for text in ("北京", " 北京"))
    assert bare != spaced and found[0] == [bare]
    assert set(found[1]) == {bare, spaced}, "the prompt is spaced, the name is not"


def test_a_tokenizer_that_puts_a_space_in_front_itself_puts_none_before_a_name():
    tokenizer = build_spaces_in_front()
    codec = codec_of(tokenizer)
    assert len(tokenizer(" Paris", add_special_tokens=False)["input_ids"]) == 2, "alone, it has two spaces"
    ((ids,),) = _spellings(codec, ["Where is"], [["Paris"]], 32)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁Paris"]
    ((glued,),) = _spellings(codec, ["北京"], [["上海"]], 32)
    assert tokenizer.convert_ids_to_tokens(glued) == ["上", "海"]
    assert codec.encode_prompts(["Where is"])[0] + list(ids) == tokenizer("Where is Paris")["input_ids"]


def test_likelihood_is_the_share_of_samples_that_begin_with_the_answer(parts):
    model, tokenizer = parts
    prompt = "Ann was born in"
    name = next(town for town in TOWNS if len(tokenizer(f" {town}")["input_ids"]) == 1)
    chance = answer_likelihoods(*coded(parts), [prompt], [[name]], temperature=0.7, max_new_tokens=1)[0]
    n = 20_000
    uniforms = np.random.default_rng(0).random((n, 1))
    drawn = decode_batch(
        model,
        [tokenizer(prompt)["input_ids"]],
        Decoding(
            max_new_tokens=1,
            stop_ids=frozenset(),
            completions_per_prompt=n,
            temperature=0.7,
            uniforms=uniforms,
        ),
    )
    share = np.mean([tokens == tokenizer(f" {name}")["input_ids"] for tokens in drawn])
    assert chance > 1e-4 and abs(share - chance) < 4 * np.sqrt(chance / n)


def test_aliases_count(parts):
    fact = Fact(relation="P17", subject="x", answers=("United States of America",))
    names = accepted_names(fact, AliasTable.load())
    assert names[0] == "United States of America" and "USA" in names and len(set(names)) == len(names)


def test_every_form_that_is_scored_counts_as_the_name():
    aliases = AliasTable.load()
    rows = {row.names: row for row in aliases.rows.values()}
    num_forms = 0
    for names in rows:
        for form in accepted_names(Fact(relation="P17", subject="x", answers=names[:1]), aliases):
            assert AnswerMatcher(names[:1], aliases).matches(f"{form}, they say."), form
            num_forms += 1
    assert num_forms > 2 * sum(map(len, rows)), "most have an article"


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("United States", "the United States"),
        ("The Gambia", "the Gambia"),
        ("actor", "an actor"),
        ("politician", "a politician"),
        ("J. R. R. Tolkien", "J.R.R. Tolkien"),
        ("J.K. Rowling", "J. K. Rowling"),
        ("St. Louis", "Saint Louis"),
        ("Procter & Gamble", "Procter and Gamble"),
        ("hour", "an hour"),
        ("university", "a university"),
        ("x", "an x"),
        ("JK Rowling", "J. K. Rowling"),
        ("J. K. Rowling", "JK Rowling"),
        ("John F. Kennedy", "John F Kennedy"),
        ("U.S.", "US"),
        ("Mt. Everest", "Mount Everest"),
        ("Fort Worth", "Ft. Worth"),
        ("São Paulo", "Sao Paulo"),
        ("Ørsted", "Orsted"),
    ],
)
def test_forms_by_hand(answer, form):
    assert form in accepted_names(Fact(relation="P17", subject="x", answers=(answer,)), AliasTable(rows={}))


def test_forms_that_mean_something_else_are_not_scored():
    names = accepted_names(Fact(relation="P136", subject="x", answers=("rock",)), AliasTable(rows={}))
    assert "rock" in names and not {"a rock", "the rock"} & set(names)
    assert not any("I.I." in form for form in written_forms("World War II"))
    assert written_forms("  ") == []


def test_scripts_without_spaces_have_no_article():
    fact = Fact(relation="P36", subject="法国", answers=("巴黎",))
    assert accepted_names(fact, AliasTable(rows={})) == ["巴黎"]


def test_an_answer_behind_an_article_adds_its_share(parts):
    """What is drawn as "the Rome" counts as often as it is drawn, beside "Rome"."""
    model, tokenizer = parts
    prompt, forms = (
        "Ann was born in",
        accepted_names(Fact(relation="P19", subject="Ann", answers=("Rome",)), AliasTable(rows={})),
    )
    with_article, bare = (
        answer_likelihoods(*coded(parts), [prompt], [names], temperature=3.0, max_new_tokens=8)[0]
        for names in (forms, ["Rome"])
    )
    spellings = [tokenizer(f" {form}")["input_ids"] for form in forms]
    assert 1 < max(map(len, spellings)) and with_article > bare > 0
    alone = answer_likelihoods(*coded(parts), [prompt], [["the Rome"]], temperature=3.0, max_new_tokens=8)
    assert with_article == pytest.approx(bare + alone[0], rel=1e-5)


def test_levels_by_likelihood_say_so_and_count_expected_hits(parts, tiny_model_folder, tmp_path):
    model, tokenizer = parts
    settings = ProbeSettings(estimator="likelihood", templates=2, samples=1000, max_new_tokens=4)
    record = Record(
        id="f", split="train", file="x", row=1, content=Fact(relation="P19", subject="Ann", answers=("Rome",))
    )
    fingerprint = fingerprint_model(str(tiny_model_folder))
    probe = Probe(
        records=[record],
        tokenizer=tokenizer,
        settings=settings,
        seed=1,
        model_fingerprint=fingerprint,
        dtype="float32",
    )
    level = probe_facts(probe, lambda: OwnGenerator(*parts), run=tmp_path)[0]
    prompts = [trial.prompt for trial in probe.trials()]
    names = [["Rome", "the Rome"]] * 2
    chances = answer_likelihoods(*coded(parts), prompts, names, temperature=0.7, max_new_tokens=4)
    assert level.hits == round(1000 * sum(chances)) > 0 and level.trials == 2000
    assert '"estimator": "likelihood"' in (tmp_path / "levels.manifest.json").read_text()
