"""Templates: prompts and questions for a subject, and a user's own relations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftcore.errors import UserInputError
from sftcore.knowledge.templates import (
    RELATIONS_PATH,
    completion_prompts,
    find_relation,
    load_relations,
)

OWN = {
    "capital-of": {
        "name": "capital",
        "domain": "in",
        "question": "What is the capital of {subject}?",
        "completions": ["The capital city of {subject} is", "{subject}的首都是"],
    }
}


def write_relations(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "relations.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_escaped(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_the_first_templates_are_used_in_order() -> None:
    relation = load_relations()["P19"]
    prompts = completion_prompts(relation, "Ada {subject} Lovelace", 6)
    assert prompts == completion_prompts(relation, "Ada {subject} Lovelace", 21)[:6]
    assert all(prompt.count("Ada {subject} Lovelace") == 1 for prompt in prompts)
    assert prompts[0] == "The birthplace of Ada {subject} Lovelace is"


@pytest.mark.parametrize("wanted", [0, 22])
def test_too_many_or_no_templates_are_refused(wanted: int) -> None:
    with pytest.raises(UserInputError, match=f"can't give {wanted} completion templates") as caught:
        completion_prompts(load_relations()["P19"], "Ada Lovelace", wanted)
    assert "allowed: 1 to 21" in str(caught.value)


def test_an_unknown_relation_says_what_to_do() -> None:
    with pytest.raises(UserInputError, match="no wording is known for the relation 'P18'") as caught:
        find_relation(load_relations(), "P18")
    assert "nearest: P1" in str(caught.value) and "relations file of your own" in str(caught.value)
    with pytest.raises(UserInputError, match="P17, P19"):
        find_relation(load_relations(), "zzz")


def test_a_users_file_adds_to_the_table_and_wins(tmp_path: Path) -> None:
    relations = load_relations(write_relations(tmp_path, OWN | {"P17": OWN["capital-of"]}))
    assert len(relations) == 25 and relations["P17"].name == "capital"
    assert relations["capital-of"].question == "What is the capital of {subject}?"
    assert completion_prompts(relations["capital-of"], "秘鲁", 2)[1] == "秘鲁的首都是"
    assert load_relations()["P17"].name == "country"


def test_tables_handed_out_are_independent() -> None:
    load_relations().clear()
    assert len(load_relations()) == 24


def test_all_mistakes_of_a_users_file_come_at_once(tmp_path: Path) -> None:
    good = OWN["capital-of"]
    path = write_relations(
        tmp_path,
        {
            "a": "text",
            "b": {"name": "b"},
            "c": good | {"domain": "both"},
            "d": good | {"completions": []},
            "e": good | {"completions": ["{subject} is in", "{subject} is in"]},
            "f": good | {"question": "Where?"},
            "g": good | {"completions": ["{subject} is in "]},
            "h": good | {"completions": [7]},
        },
    )
    with pytest.raises(UserInputError) as caught:
        load_relations(path)
    message = str(caught.value)
    for part in (
        "relations.json: a: a relation has the keys",
        "relations.json: b: a relation has the keys name, domain, question, completions; got ['name']",
        "relations.json: c: domain is one of ('in', 'out'); got 'both'",
        "relations.json: d: completions is a list of at least one prefix",
        "relations.json: e: completions is a list of at least one prefix, all different",
        "relations.json: f: each text holds {subject} exactly once; got 'Where?'",
        "relations.json: g: a prefix has no spaces around it",
        "relations.json: h: each text holds {subject} exactly once; got 7",
    ):
        assert part in message
    assert len(caught.value.problems) == 8


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="not a table of relations"):
        load_relations(write_relations(tmp_path, [OWN]))
    with pytest.raises(UserInputError, match="no such file"):
        load_relations(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 5}, "name is not text"),
        ({"name": None}, "name is not text"),
        ({"name": ""}, "name is not text, or empty"),
        ({"name": "a\ud800"}, "name has half characters"),
        ({"question": "What of\0 {subject}?"}, "a question has a NUL"),
        ({"question": "What of {subject} is {object}?"}, "no brace but those of {subject}"),
        ({"question": " Who rules {subject}? "}, "a question has no spaces around it"),
        ({"completions": ["{subject} {is"]}, "no brace but those"),
    ],
)
def test_odd_texts_of_a_relation_are_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        load_relations(write_escaped(tmp_path / "a.json", {"a": OWN["capital-of"] | change}))


def test_odd_ids_and_files_of_relations_are_named(tmp_path: Path) -> None:
    for table, said in (({}, "not a table"), ({"": OWN["capital-of"]}, "id is text")):
        with pytest.raises(UserInputError, match=said):
            load_relations(write_escaped(tmp_path / f"{len(table)}.json", table))
    text = json.dumps(OWN)
    twice = tmp_path / "twice.json"
    twice.write_text(f"{text[:-1]},{text[1:]}")
    with pytest.raises(UserInputError, match="the same name twice: capital-of"):
        load_relations(twice)
    marked = tmp_path / "marked.json"
    marked.write_text(text, encoding="utf-8-sig")
    assert "capital-of" in load_relations(marked)


def test_the_shipped_file_is_read_like_a_users() -> None:
    assert load_relations(RELATIONS_PATH) == load_relations()
