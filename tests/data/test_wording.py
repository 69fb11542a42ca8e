"""Templates: names, placeholders, languages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from sftcore.config import InlineTemplate, Recipe
from sftcore.data.contents import Pair
from sftcore.data.relations import load_relations
from sftcore.data.wording import PromptOptions, load_template, question_patterns
from sftcore.errors import UserInputError
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.pair import language_of
from sftcore.tasks.template import Template

NAMES = {
    "qa": ("qa-plain", "qa-lines", "qa-bare", "qa-lines-zh"),
    "matching": tuple(f"matching-{kind}-{lang}" for kind in ("concise", "complex") for lang in ("zh", "en")),
}


def recipe(**data):
    task = data.pop("task", "qa")
    data = {"train": [{"format": "facts", "path": "f"}]} | data
    return Recipe.model_validate(
        {"model": {"path": "m"}, "task": task, "data": data, "batch": {"samples_per_step": 1}}
    )


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in NAMES.items() for name in names])
def test_shipped_templates_fit_their_task(task, name):
    template = load_template(name, task=task)
    values = {"question": "Q?", "subject": "S", "a": "x", "b": "y", "label_0": "no", "label_1": "yes"}
    prompt, completion = template.fill(values | {"answer": "ANSWER", "label": "ANSWER"})
    assert completion.strip() == "ANSWER" and "ANSWER" not in prompt
    assert "{" not in prompt
    assert prompt[-1] == "\n" or (completion[0] == " " and not prompt[-1].isspace())  # a clean seam


SPLITTING_RULES = {  # how byte-level tokenizers cut a text before they merge anything
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("rule", SPLITTING_RULES)
@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in NAMES.items() for name in names])
def test_the_seam_of_shipped_templates_falls_between_tokens(rule, task, name):
    split = pre_tokenizers.Split(Regex(SPLITTING_RULES[rule]), "isolated")
    template = load_template(name, task=task)
    for answer in ("Paris", "1969", "北京", '"X"', "(a)", "é", "'s", "¿", "-1"):
        values = {"question": "Q?", "a": "x", "b": "y", "label_0": "no", "label_1": "yes"}
        prompt, completion = template.fill(values | {"answer": answer, "label": answer})
        ends = [end for _, (_, end) in split.pre_tokenize_str(prompt + completion)]
        assert len(prompt) in ends, answer
    torn = [end for _, (_, end) in split.pre_tokenize_str("A: Paris")]
    assert len("A: ") not in torn  # the case that this test exists for


def test_the_default_template_has_the_form_of_the_paper():
    assert load_template("qa-plain", task="qa").fill({"question": "Who?", "answer": "Ann"}) == (
        "<|question|> Who? <|answer|>",
        " Ann",
    )


@given(st.text(), st.text())
def test_texts_are_put_in_as_they_are(question, answer):
    template = Template(name="t", prompt="{{x}} {question}!", completion="{answer}")
    assert template.fill({"question": question, "answer": answer}) == ("{x} " + question + "!", answer)


@pytest.mark.parametrize(
    ("task", "prompt", "completion", "messages"),
    [
        ("qa", "{question} {text}", "{answer}", ["unknown placeholder {text} in the prompt of task qa"]),
        ("qa", "Q:", "{answer}", ["no {question} or {subject} in the prompt of task qa"]),
        ("qa", "{question}", "x", ["no {answer} in the completion of task qa"]),
        ("qa", "{answer}", "{}", ["unknown placeholder {answer}", "unknown placeholder {}", "no {answer}"]),
        ("qa", "{question!r} {subject:>9}", "{answer}", ["{question!r}", "{subject:>9}"]),
        ("qa", "{question.__class__}{subject}", "{answer}", ["unknown placeholder {question.__class__}"]),
        ("qa", "{question", "{answer}}", ["prompt: expected '}'", "completion: Single '}'"]),
        ("matching", "{a}", "{label}", ["no {b} in the prompt of task matching"]),
    ],
)
def test_wrong_placeholders_are_all_reported(task, prompt, completion, messages):
    with pytest.raises(UserInputError) as caught:
        load_template(InlineTemplate(prompt=prompt, completion=completion), task=task)
    assert all(message in str(caught.value) for message in messages)
    assert "data.template inline" in str(caught.value)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(
        UserInputError, match="no such template\n.*got: qa-plane\n.*allowed: qa-plain, .*\n.*'qa-plain'"
    ):
        load_template("qa-plane", task="qa")
    with pytest.raises(UserInputError, match="name one of these, or write it inline"):
        load_template("zzz", task="qa")


@pytest.mark.parametrize(("task", "other"), [("qa", "matching-"), ("matching", "qa-")])
def test_an_unknown_name_is_answered_with_those_of_the_task(task, other):
    with pytest.raises(UserInputError) as caught:
        load_template(f"{other}absent", task=task)
    allowed = caught.value.problems[0].allowed.split(", ")
    assert len(allowed) >= 4 and all(name.startswith(f"{task}-") for name in allowed)


def test_a_template_of_the_other_task_is_refused():
    with pytest.raises(UserInputError, match="unknown placeholder {question} in the prompt of task matching"):
        load_template("qa-lines", task="matching")


def test_matching_takes_its_own_prompts_unless_a_template_is_given():
    assert {k: t.name for k, t in PromptOptions.of(recipe(task="matching")).templates.items()} == {
        "zh": "matching-concise-zh",
        "en": "matching-concise-en",
    }
    resolved = Recipe.model_validate(recipe(task="matching").model_dump())  # as in RUN/recipe.yaml
    assert PromptOptions.of(resolved).templates == PromptOptions.of(recipe(task="matching")).templates
    given_one = recipe(task="matching", template={"prompt": "{a}|{b}", "completion": "{label}"})
    assert PromptOptions.of(given_one).templates["any"].prompt == "{a}|{b}"
    assert PromptOptions.of(recipe(task="chat")).templates == {}


def test_identity_covers_what_the_task_uses():
    qa, matching = (PromptOptions.of(recipe(task=task)).identity() for task in ("qa", "matching"))
    assert qa["matching"] is None and matching["matching"]["labels"]["zh"] == ["不同", "相同"]
    longer = PromptOptions.of(recipe(max_length=9)).identity()
    assert [key for key in qa if qa[key] != longer[key]] == ["max_length"]


@pytest.mark.parametrize(
    ("a", "b", "language"),
    [
        ("今天天气", "天气如何", "zh"),
        ("Audubon 委员会与 Four Rivers", "委员会", "zh"),
        ("Hello there", "General Kenobi says 北", "en"),
        ("123", "!?", "en"),
        ("𠀀𠀁", "𠀂", "zh"),
    ],
)
def test_language_by_script(a, b, language):
    pair = Pair(a=a, b=b, label=0)
    assert language_of(pair, "auto") == language
    assert [language_of(pair, fixed) for fixed in ("zh", "en")] == ["zh", "en"]


def test_question_patterns_have_one_place_for_the_subject():
    patterns = question_patterns()
    assert len(patterns) >= 24 and {"P17", "P36", "P800"} <= set(patterns)
    assert all(pattern.count("{subject}") == 1 for pattern in patterns.values())


def test_every_task_with_templates_has_its_placeholders():
    assert {name for name, task in TASKS.items() if task.placeholders} == {"qa", "matching"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "Who rules?"}, "each text holds {subject} exactly once; got 'Who rules?'"),
        ({"question": "Who rules {subject}, {subject}?"}, "each text holds {subject} exactly once"),
        ({"question": 7}, "each text holds {subject} exactly once; got 7"),
        ({"completions": None}, "completions is a list of at least one prefix"),
        ({"extra": 1}, "a relation has the keys name, domain, question, completions"),
    ],
)
def test_a_file_of_relations_is_read_by_one_rule_for_training_and_probing(tmp_path, entry, message):
    good = {"name": "r", "domain": "in", "question": "Who rules {subject}?", "completions": ["{subject}:"]}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"rule": good | entry}))
    for read in (lambda: question_patterns(str(path)), lambda: load_relations(path)):
        with pytest.raises(UserInputError) as caught:
            read()
        assert message in str(caught.value)
    path = tmp_path / "good.json"
    path.write_text(json.dumps({"rule": good}))
    assert question_patterns(str(path))["rule"] == good["question"] == load_relations(path)["rule"].question
