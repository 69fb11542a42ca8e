"""What a wrong value is told as: the key, what it takes, what was got; no sentence of a library."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.recipe import load_recipe
from sftcore.study.grid import read_study
from sftcore.yaml_text import parse_yaml

MINIMAL = {
    "model": {"path": "org/model"},
    "data": {"train": [{"format": "jsonl", "path": "train.jsonl"}]},
    "batch": {"samples_per_step": 8},
}
THEIRS = ("Input should", "should be", "unable to", "Field required", "String should", "while ", "expected ")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    return tmp_path / "r.yaml"


def told(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserInputError) as refused:
        load_recipe(recipe, list(overrides))
    assert not any(words in str(refused.value) for words in THEIRS)
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "got", "allowed"),
    [
        ("train.lr=fast", "'fast'", "a number, or 'auto'"),
        ("train.lr=-1", "-1", "a number over 0, or 'auto'"),
        ("train.lr=.inf", "inf", "a finite number, or 'auto'"),
        ("train.epochs=1.5", "1.5", "a whole number"),
        ("train.warmup_ratio=2", "2", "a number of 1 or less"),
        ("train.betas=[0.9, 2]", "2", "a number under 1"),
        ("train.betas=0.9", "0.9", "a list"),
        ("train.scheduler=cos", "'cos'", "'cosine', 'linear', 'constant' or 'wsd'"),
        ("model.trust_remote_code=perhaps", "'perhaps'", "true or false"),
        ("adapter.targets=3", "3", "'all-linear', or a list"),
        ("data.train=[]", "[]", "a list with 1 or more items"),
        ("data.template=5", "5", "text, or a section (keys with values)"),
        ("checkpoint=5", "5", "a section (keys with values)"),
        ("name=a/b", "'a/b'", "letters, digits, '.', '_' and '-', not dots alone"),
    ],
)
def test_what_a_key_takes_is_said_in_our_words(recipe, override, got, allowed):
    said = told(recipe, override)
    assert f"--set {override.partition('=')[0]}" in said
    assert f"this key does not take such a value\n    got: {got}\n    allowed: {allowed}\n" in said
    assert said.endswith("do: `sftcore schema --markdown` prints all keys with what they take")


@pytest.mark.parametrize("override", [".=1", "=1", "train.=1", ".=a\0b"])
def test_a_key_without_a_name_is_unknown_or_no_override(recipe, override):
    assert any(
        words in told(recipe, override) for words in ("unknown key", "an override is written a.b=value")
    )


def test_a_number_as_a_name_is_to_be_quoted_and_what_lacks_is_named(recipe):
    said = told(recipe, "name=3")
    assert said.endswith("got: 3\n    allowed: text\n    do: put it in quotes, so that it is text")
    assert "train.betas.1: an item of this list is missing" in told(recipe, "train.betas=[0.9]")
    said = told(recipe, "data.template={a: 1}")
    assert (
        said.count("required key is missing\n    do: add it") == 2 and "data.template.a: unknown key" in said
    )
    assert "such a value" not in said, "it is a section: text is not what was meant"


def test_a_studys_mistakes_are_told_alike(tmp_path):
    (tmp_path / "s.yaml").write_text("base: 3\ndraws: many\ngrit: {}\n")
    with pytest.raises(UserInputError) as refused:
        read_study(tmp_path / "s.yaml")
    said = str(refused.value)
    assert not any(words in said for words in THEIRS)
    assert "s.yaml: base: this key does not take such a value\n    got: 3\n    allowed: text" in said
    assert (
        "s.yaml: draws: this key does not take such a value\n    got: 'many'\n    allowed: a whole number"
        in said
    )
    assert "s.yaml: grit: unknown key\n    allowed: name, base" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "brackets do not match, or a comma is missing"),
        ("a: [1,\nb: 2", "brackets do not match, or a comma is missing, line 2: b: 2"),
        ("a: b: c", "a colon stands where no key can be"),
        ("a:\n\tb: 1", "a tab begins this value, line 2: b: 1"),
        ('a: "x', "a quote is opened and not closed"),
        ("a: @x", "a sign that has a meaning of its own begins this value"),
        (
            "- a\nb: 1",
            "the indentation does not fit, or a bracket or quote is closed early, line 2: b: 1",
        ),
        ("a: *b", "* begins a name of YAML's own, and none was given before"),
        ("--- 1\n--- 2", "only one document can be here: leave out the second ---, line 2: --- 2"),
        ("a: 1\na: 2", "key 'a' given twice, line 2: a: 2"),
    ],
)
def test_what_is_no_yaml_is_said_in_our_words_with_its_line(recipe, text, said):
    with pytest.raises(ValueError) as refused:
        parse_yaml(text)
    assert str(refused.value) == said
    recipe.write_text(text)
    assert f"r.yaml: not valid YAML: {said}\n    do: fix that line" in told(recipe)


def test_an_override_that_is_no_yaml_is_to_be_quoted(recipe):
    said = told(recipe, "train.lr=[1")
    assert said.startswith("--set train.lr: not a YAML value: brackets do not match, or a comma is missing\n")
    assert said.endswith("    got: [1\n    do: put the value in quotes: --set 'train.lr=\"...\"'")


@given(text=st.text(alphabet="ab:-[]{}\"'#&*!|>%@` \n\t,?\\0", max_size=30))
def test_no_text_is_refused_in_the_words_of_a_library(text):
    try:
        parse_yaml(text)
    except ValueError as error:
        told = str(error).partition(", line ")[0]
        assert told and not any(words in told for words in THEIRS) and "\n" not in told
