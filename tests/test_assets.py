"""The shipped assets: own wording, fitting templates, a clean alias table, facts without overlap."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from sftcore.assets.make_facts import SourceFact, ambiguous_subjects, draw, fit_facts, main, reason_to_drop
from sftcore.data.subjects import recover_subjects
from sftcore.fsio import read_jsonl
from sftcore.knowledge.containment import ALIASES_PATH, AliasTable, AnswerMatcher, normalise
from sftcore.knowledge.templates import SUBJECT, load_relations

ASSETS = Path(__file__).parent.parent / "sftcore" / "assets"
IN_DOMAIN = "P17 P19 P20 P36 P69 P131 P159 P276 P495 P740".split()  # docs/methods.md M1
OUT_OF_DOMAIN = "P26 P40 P50 P106 P112 P127 P136 P170 P175 P176 P264 P407 P413 P800".split()
RELATIONS = load_relations()
ALIASES = AliasTable.load()
FACTS = {name: read_jsonl(ASSETS / "facts" / f"{name}.jsonl") for name in ("train", "test", "ood")}
DATA = Path(os.environ.get("SFTCORE_TEST_DATA", "/nonexistent")) / "entityquestions"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="set SFTCORE_TEST_DATA")
BEFORE_AN_OBJECT = frozenset(  # prepositions, verbs, nouns that a name stands beside, "namely"
    "about as at behind by for from in of on to under with within "
    "are attended become comes creating hear include included includes is know like speak stands stood "
    "understand use was wed called named written "
    "author capital company creator founder label language maker manufacturer name owner performer trade "
    "namely".split()
)
NOT_BEFORE_AN_OBJECT = {"a", "an", "the"}  # the object brings its own article


def read_source(split: str, relation: str) -> list[dict]:
    return json.loads((DATA / split / f"{relation}.{split}.json").read_text(encoding="utf-8"))


# --- relations.json


def test_the_relations_are_those_of_the_paper() -> None:
    assert sorted(IN_DOMAIN) == sorted(r.id for r in RELATIONS.values() if r.domain == "in")
    assert sorted(OUT_OF_DOMAIN) == sorted(r.id for r in RELATIONS.values() if r.domain == "out")


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_templates_end_right_before_the_object(relation) -> None:
    assert len(relation.completions) == len({normalise(text) for text in relation.completions}) == 21
    for prefix in relation.completions:
        assert prefix.count(SUBJECT) == 1 and prefix == " ".join(prefix.split())
        assert prefix[-1].isalpha() and prefix.split()[-1] not in NOT_BEFORE_AN_OBJECT
        assert prefix.startswith(SUBJECT) or prefix[0].isupper()
    question = relation.question
    assert question.count(SUBJECT) == 1 and question.endswith("?") and question[0].isupper()
    assert question == " ".join(question.split())


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_templates_vary(relation) -> None:
    first_six = relation.completions[:6]
    assert len({prefix.split()[-1] for prefix in relation.completions}) >= 4  # not one sentence 21 times
    assert any(p.startswith(SUBJECT) for p in first_six) and not all(p.startswith(SUBJECT) for p in first_six)


def test_no_template_leaks_an_answer() -> None:
    frequent = Counter(
        (row["relation"], a) for rows in FACTS.values() for row in rows for a in row["answers"]
    )
    assert len(frequent) > 2000
    for relation_id, answer in frequent:
        words = " ".join((RELATIONS[relation_id].question, *RELATIONS[relation_id].completions))
        assert not AnswerMatcher([answer], ALIASES).matches(words.replace(SUBJECT, "X1")), (
            relation_id,
            answer,
        )


def english_faults(template: str, subject: str) -> list[str]:
    """What a reader would stumble over in a prefix with a subject in it, as far as rules can tell.

    Faults of the subject itself are not the template's ("Duran Duran", ":)"), nor is "A Watering Can can be".
    """
    before, _, after = template.partition(SUBJECT)
    text, words = template.replace(SUBJECT, subject), template.split()
    start, end = (before.split() or [""])[-1].lower(), (after.split() or [""])[0].lower()
    articles = re.findall(r"\b([Aa]n?) (\w+)", before + "#" + after)
    own_brackets = [subject.count(bracket) for bracket in "()[]"]
    checks = {
        "a brace is left": "{" in text or "}" in text,
        "no single spaces": text != " ".join(text.split()),
        "begins neither with the subject nor with a capital": bool(before) and not before[0].isupper(),
        "a capital inside": any(word[0].isupper() for word in words[1:] if word != SUBJECT),
        "ends with a mark": not text[-1].isalpha(),
        "an object can't follow its last word": words[-1] not in BEFORE_AN_OBJECT,
        "a doubled word": any(a.lower() == b.lower() for a, b in itertools.pairwise(words))
        or start == subject.split()[0]
        or end == subject.split()[-1],
        "an article before a name": start in {"a", "an", "the"},
        "a or an": any((article.lower() == "an") != (word[0] in "aeiou") for article, word in articles),
        "a plural verb behind one subject": not before and end in {"are", "were", "have", "do"},
        "brackets": [text.count(bracket) for bracket in "()[]"] != own_brackets,
    }
    return [fault for fault, is_there in checks.items() if is_there]


def samples_of(relation_id: str) -> list[dict]:
    """Ten facts of a relation, from its first to its last."""
    rows = [row for table in FACTS.values() for row in table if row["relation"] == relation_id]
    return rows[:: len(rows) // 10][:10]


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_templates_read_as_english_for_ten_subjects(relation) -> None:
    facts = samples_of(relation.id)
    assert len({fact["subject"] for fact in facts}) == 10
    for template, fact in itertools.product(relation.completions, facts):
        assert not english_faults(template, fact["subject"]), (template, fact["subject"])
        prompt = template.replace(SUBJECT, fact["subject"])
        assert not AnswerMatcher(fact["answers"], ALIASES).matches(prompt), (prompt, fact["answers"])


@pytest.mark.parametrize(
    ("template", "subject", "fault"),
    [
        ("The capital of {subject} is {x}", "Peru", "a brace is left"),
        ("The capital  of {subject} is", "Peru", "no single spaces"),
        ("the capital of {subject} is", "Peru", "begins neither with the subject nor with a capital"),
        ("The Capital of {subject} is", "Peru", "a capital inside"),
        ("The capital of {subject} is:", "Peru", "ends with a mark"),
        ("The capital of {subject} is the", "Peru", "an object can't follow its last word"),
        ("The capital of of {subject} is", "Peru", "a doubled word"),
        ("{subject} band was formed in", "Jazz band", "a doubled word"),
        ("The capital of the {subject} is", "Peru", "an article before a name"),
        ("{subject} is an product of", "Fiat 500", "a or an"),
        ("{subject} is a example of", "Jazz", "a or an"),
        ("{subject} were formed in", "Queen", "a plural verb behind one subject"),
        ("The town (of {subject} is", "Queen", "brackets"),
    ],
)
def test_what_does_not_read_as_english_is_found(template: str, subject: str, fault: str) -> None:
    assert fault in english_faults(template, subject)


def test_a_subjects_own_oddities_are_no_faults_of_the_template() -> None:
    assert not english_faults("{subject} was formed in", "Duran Duran (band)")


@needs_data
def test_wording_is_our_own() -> None:
    for relation in RELATIONS.values():
        question = read_source("dev", relation.id)[0]["question"]
        subject = recover_subjects([row["question"] for row in read_source("dev", relation.id)])[0]
        theirs = normalise(question.replace(subject, SUBJECT))
        assert SUBJECT in theirs
        ours = {normalise(text).rstrip("?") for text in (relation.question, *relation.completions)}
        assert theirs.rstrip("?") not in ours


# --- aliases.tsv


def test_the_alias_table_is_large_and_its_names_are_apart() -> None:
    rows = set(ALIASES.rows.values())
    assert len(rows) >= 200 and len(rows) == len(ALIASES_PATH.read_text(encoding="utf-8").splitlines()) - 1
    names = [normalise(name) for row in rows for name in row.names]
    assert len(names) == len(set(names)) and min(map(len, names)) >= 2
    assert ALIASES.row_of("USA").names[0] == "United States of America"
    assert "georgia" not in ALIASES.rows


@needs_data
def test_most_canonical_names_are_answers_of_the_data_set() -> None:
    answers = {
        normalise(answer)
        for relation in RELATIONS
        for split in ("train", "dev", "test")
        for row in read_source(split, relation)
        for answer in row["answers"]
    }
    canonical = {normalise(row.names[0]) for row in ALIASES.rows.values()}
    assert len(canonical & answers) >= 0.95 * len(canonical)


# --- facts


@pytest.mark.parametrize(
    ("name", "relations", "size"),
    [("train", IN_DOMAIN, 330), ("test", IN_DOMAIN, 120), ("ood", OUT_OF_DOMAIN, 60)],
)
def test_facts_are_complete_balanced_and_interleaved(name: str, relations: list[str], size: int) -> None:
    rows = FACTS[name]
    assert Counter(row["relation"] for row in rows) == dict.fromkeys(relations, size)
    for start in range(0, len(rows), len(relations)):
        assert [row["relation"] for row in rows[start : start + len(relations)]] == relations
    for row in rows:
        assert list(row) == ["id", "relation", "subject", "answers"]
        assert re.fullmatch(rf"{row['relation']}-\d{{6}}", row["id"])
        assert row["answers"] and all(len(answer) >= 2 for answer in row["answers"])
        assert not AnswerMatcher(row["answers"], ALIASES).matches(row["subject"])
        assert all(text == " ".join(text.split()) for text in (row["subject"], *row["answers"]))


def test_no_subject_is_trained_and_tested() -> None:
    subjects = {name: {normalise(row["subject"]) for row in rows} for name, rows in FACTS.items()}
    assert len(subjects["train"]) > 3000
    assert not subjects["train"] & (subjects["test"] | subjects["ood"])
    ids = [row["id"] for rows in FACTS.values() for row in rows]
    assert len(ids) == len(set(ids)) == 5340


def test_only_facts_are_shipped() -> None:
    for name in FACTS:
        assert '?"' not in (ASSETS / "facts" / f"{name}.jsonl").read_text(encoding="utf-8").replace('!?"', "")


@needs_data
def test_facts_rebuild_to_the_same_bytes(tmp_path: Path) -> None:
    main([str(DATA), "--to", str(tmp_path)])
    for name in FACTS:
        shipped = (ASSETS / "facts" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped


def make_fact(number: int, subject: str, *answers: str, split: str = "train") -> SourceFact:
    return SourceFact(id=f"P20-{number:06d}", relation="P20", split=split, subject=subject, answers=answers)


@pytest.mark.parametrize(
    ("fact", "reason"),
    [
        (make_fact(1, "Ada Lovelace", "London"), ""),
        (make_fact(1, "19", "London"), "subject too short"),
        (make_fact(1, "2002", "London"), "without a letter"),
        (make_fact(1, "A" * 81, "London"), "too long"),
        (make_fact(1, "Ada Lovelace", "Y"), "an answer shorter than 2"),
        (make_fact(1, "Ada Lovelace"), "no answer or more than 8"),
        (make_fact(1, "Ada Lovelace", *(f"place {n}" for n in range(9))), "no answer or more than 8"),
        (make_fact(1, "Honda Civic", "Arman Ansari"), "vandalism"),
        (make_fact(1, "University of London", "London"), "read off the subject"),
        (make_fact(1, "Gmina Koszyce", "Koszyce, Lesser Poland"), "read off the subject"),
        (make_fact(1, "Bombay Dock", "Mumbai"), "read off the subject"),
    ],
)
def test_reasons_to_drop(fact: SourceFact, reason: str) -> None:
    found = reason_to_drop(fact, ALIASES)
    assert reason in found and bool(reason) == bool(found)


def test_ambiguous_subjects_go_and_repeated_rows_stay_once() -> None:
    facts = [
        make_fact(0, "John Smith", "London"),
        make_fact(1, "JOHN SMITH", "Paris"),
        make_fact(2, "Ann Bell", "Oslo"),
        make_fact(3, "Ann Bell", "Oslo", split="test"),
        make_fact(4, "Eve Stone", "Rome"),
        make_fact(5, "Eve Stone", "rome"),
    ]
    assert ambiguous_subjects(facts) == {"john smith", "ann bell"}
    dropped = Counter[str]()
    assert [fact.id for fact in fit_facts(facts, ALIASES, dropped)] == ["P20-000004"]
    assert dropped == {"subject in two splits or with different answers": 4, "row repeated": 1}


def test_a_draw_is_round_robin_and_avoids_taken_subjects() -> None:
    table = {
        name: [make_fact(n, f"{name} {n}", "Oslo") for n in range(count)]
        for name, count in (("a", 9), ("b", 2))
    }
    drawn = draw(table, "train", 4, seed=1, taken={"a 0", "a 1", "b 0"})
    assert [fact.subject.split()[0] for fact in drawn] == ["a", "b", "a", "a", "a"]
    assert not {fact.key for fact in drawn} & {"a 0", "a 1", "b 0"}
    assert draw(table, "test", 4, seed=1) == []


# --- pairs


PAIRS = {name: ASSETS / "pairs" / f"{name}.tsv" for name in ("reasoned", "plain", "test")}


def read_pairs(name: str) -> list[dict[str, str]]:
    header, *lines = PAIRS[name].read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def test_pairs_are_many_balanced_and_unlike() -> None:
    rows = {name: read_pairs(name) for name in PAIRS}
    assert sum(map(len, rows.values())) >= 400 and len(rows["reasoned"]) >= 200
    for name, of_file in rows.items():
        assert Counter(row["label"] for row in of_file) == dict.fromkeys("01", len(of_file) // 2), name
        assert all(row["sentence1"] != row["sentence2"] for row in of_file)
    sides = [frozenset((row["sentence1"], row["sentence2"])) for table in rows.values() for row in table]
    assert len(set(sides)) == len(sides), "each pair once, in either order"


def test_no_sentence_is_trained_and_tested() -> None:
    sentences = {
        name: {row[s] for row in read_pairs(name) for s in ("sentence1", "sentence2")} for name in PAIRS
    }
    assert not sentences["test"] & (sentences["reasoned"] | sentences["plain"])


def shared_characters(row: dict[str, str]) -> float:
    a, b = Counter(row["sentence1"]), Counter(row["sentence2"])
    return (a & b).total() / min(a.total(), b.total())


def test_different_pairs_share_most_characters() -> None:
    """So that counting characters does not solve the task: it would call them the same."""
    for name in PAIRS:
        shares = {
            label: [shared_characters(r) for r in read_pairs(name) if r["label"] == label] for label in "01"
        }
        assert sum(share > 0.5 for share in shares["0"]) > 0.8 * len(shares["0"]), name
        assert sum(shares["0"]) / len(shares["0"]) > sum(shares["1"]) / len(shares["1"]), name


def test_rationales_are_sentences_of_their_own() -> None:
    rationales = [row["rationale"] for row in read_pairs("reasoned")]
    assert len(set(rationales)) > 0.95 * len(rationales)
    assert all(8 <= len(rationale) <= 60 and rationale.endswith("。") for rationale in rationales)
