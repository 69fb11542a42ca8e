"""Builds assets/facts/{train,test,ood}.jsonl from EntityQuestions: facts only, no question of the data set.

In: a folder with {train,dev,test}/P*.{split}.json (lists of question, answers). Out: rows id, relation,
subject, answers. Run from the project's root:

    python -m sftcore.assets.make_facts DATA/entityquestions [--to FOLDER] [--seed 17]

Invariant: no subject, normalised, is both in train.jsonl and in test.jsonl or ood.jsonl; the same source,
seed and sizes give the same bytes.
Trade-off: what is doubtful goes (an ambiguous name, an answer that can be read off its subject); 200,514 of
the 220,703 source rows are left to draw from.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftcore.data.subjects import recover_subjects
from sftcore.fsio import read_json, write_jsonl
from sftcore.knowledge.containment import AliasTable, normalise, word_finds
from sftcore.knowledge.spelling import tidy
from sftcore.knowledge.templates import load_relations
from sftcore.log import log, setup_logging

SPLITS = ("train", "dev", "test")
SIZES = {"train": 330, "test": 120, "ood": 60}  # facts of each relation
MIN_ANSWER_LENGTH = 2  # characters
SUBJECT_LENGTHS = range(3, 81)  # characters: "19" and "+" name too much, 47 subjects are longer than 80
MAX_ANSWERS = 8  # 39 rows list more (55 children of one king): guessing one of them shows little
VANDALISM = frozenset({"Arman Ansari", "Viadinho historico"})  # 70 cars' "maker", 18 works' "creator"
NEED_CAPITALS = frozenset("as at can do go had has he her if is it la may me mit my un up us we who".split())
FACTS_FOLDER = Path(__file__).parent / "facts"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFact:
    """One row of EntityQuestions without its question.

    Args:
        id: P17-000123: the row's number in the relation's train, dev and test files put end to end.
        relation: Wikidata property.
        split: train, dev or test.
        subject: recovered from the question, spaces tidied.
        answers: as in the source, spaces tidied.
    """

    id: str
    relation: str
    split: str
    subject: str
    answers: tuple[str, ...]

    @property
    def key(self) -> str:
        """What makes two subjects the same."""
        return normalise(self.subject)


def read_relation(source: Path, relation: str) -> list[SourceFact]:
    """All rows of a relation; the subjects are recovered over its three files together."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for split in SPLITS:
        rows += [(split, row) for row in read_json(source / split / f"{relation}.{split}.json")]
    subjects = recover_subjects([row["question"] for _, row in rows])
    return [
        SourceFact(
            id=f"{relation}-{number:06d}",
            relation=relation,
            split=split,
            subject=" ".join(subject.split()),
            answers=tuple(" ".join(answer.split()) for answer in row["answers"]),
        )
        for number, ((split, row), subject) in enumerate(zip(rows, subjects, strict=True))
    ]


def reason_to_drop(fact: SourceFact, aliases: AliasTable) -> str:
    """Why a fact is unfit by itself, "" if it is fit."""
    if len(fact.subject) not in SUBJECT_LENGTHS or not any(char.isalpha() for char in fact.subject):
        return "subject too short, too long or without a letter"
    if any(len(answer) < MIN_ANSWER_LENGTH for answer in fact.answers):
        return f"an answer shorter than {MIN_ANSWER_LENGTH} characters"
    if not 1 <= len(fact.answers) <= MAX_ANSWERS:
        return f"no answer or more than {MAX_ANSWERS}"
    if VANDALISM.intersection(fact.answers):
        return "vandalism"
    heads = [normalise(answer.split(",")[0]) for answer in fact.answers]  # "Koszyce, Lesser Poland"
    if any(head in fact.key for head in heads) or is_read_off(fact, aliases):
        return "an answer can be read off the subject"
    return ""


def is_read_off(fact: SourceFact, aliases: AliasTable) -> bool:
    """Whether the subject holds an answer or alias letter by letter, as words; near misses apart.

    Plainer than `AnswerMatcher`, whose spellings grow from version to version: the shipped facts are drawn by
    this.
    """
    rows = dict.fromkeys(map(aliases.row_of, fact.answers))
    return any(_holds(fact, name, row.near_misses) for row in rows for name in row.names)


def _holds(fact: SourceFact, name: str, near_misses: Sequence[str]) -> bool:
    """Whether the subject holds one name."""
    needs_capitals = name.isupper() and normalise(name) in NEED_CAPITALS
    subject, full = (tidy(fact.subject), tidy(name)) if needs_capitals else (fact.key, normalise(name))
    text = full.rstrip(".") or full
    phrases = [normalise(phrase) for phrase in near_misses]
    offsets = [(phrase, i) for phrase in phrases for i in range(len(phrase)) if phrase.startswith(text, i)]
    for start in word_finds(subject, text):
        is_longer = text != full and re.match(r"\.\w", subject[start + len(text) :])  # "U.S." in "U.S.S.R."
        is_other = any(start >= i and subject.startswith(phrase, start - i) for phrase, i in offsets)
        if not (is_longer or is_other):
            return True
    return False


def ambiguous_subjects(facts: Iterable[SourceFact]) -> set[str]:
    """Keys of one relation's subjects that occur in two splits, or with different answers."""
    seen: dict[str, set[tuple[str, tuple[str, ...]]]] = defaultdict(set)
    for fact in facts:
        seen[fact.key].add((fact.split, tuple(sorted(map(normalise, fact.answers)))))
    return {key for key, uses in seen.items() if len(uses) > 1}


def fit_facts(
    facts: Sequence[SourceFact], aliases: AliasTable, dropped: Counter[str]
) -> Iterator[SourceFact]:
    """The facts of one relation that may be drawn, each subject once; counts the others in `dropped`."""
    ambiguous = ambiguous_subjects(facts)
    used: set[str] = set()
    for fact in facts:
        reason = reason_to_drop(fact, aliases)
        if not reason and fact.key in ambiguous:
            reason = "subject in two splits or with different answers"
        if not reason and fact.key in used:
            reason = "row repeated"
        if reason:
            dropped[reason] += 1
            continue
        used.add(fact.key)
        yield fact


def draw(
    facts: Mapping[str, Sequence[SourceFact]],
    split: str,
    size: int,
    *,
    seed: int,
    taken: Collection[str] = (),
) -> list[SourceFact]:
    """`size` facts of each relation from one split, round-robin, none about a `taken` subject."""
    columns = []
    for relation_facts in facts.values():
        fit = [fact for fact in relation_facts if fact.split == split and fact.key not in taken]
        columns.append(sorted(fit, key=lambda fact: _rank(fact.id, seed))[:size])
    rounds = itertools.zip_longest(*columns)
    return [fact for fact in itertools.chain.from_iterable(rounds) if fact is not None]


def _rank(fact_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{fact_id}".encode()).digest()


def build_facts(source: Path, *, seed: int, sizes: Mapping[str, int] = SIZES) -> dict[str, list[SourceFact]]:
    """The facts of the three files. Test and ood are drawn first; train then avoids their subjects."""
    aliases, dropped = AliasTable.load(), Counter[str]()
    domains: dict[str, dict[str, list[SourceFact]]] = {"in": {}, "out": {}}
    for relation in load_relations().values():
        rows = read_relation(source, relation.id)
        domains[relation.domain][relation.id] = list(fit_facts(rows, aliases, dropped))
    for reason, count in dropped.most_common():
        log.info("dropped %6d: %s", count, reason)
    log.info("left    %6d", sum(len(facts) for table in domains.values() for facts in table.values()))
    test = draw(domains["in"], "test", sizes["test"], seed=seed)
    ood = draw(domains["out"], "test", sizes["ood"], seed=seed)
    taken = {fact.key for fact in (*test, *ood)}
    train = draw(domains["in"], "train", sizes["train"], seed=seed, taken=taken)
    return {"train": train, "test": test, "ood": ood}


def to_row(fact: SourceFact) -> dict[str, Any]:
    """The shipped row: no split, since the file tells it, and no question."""
    return {"id": fact.id, "relation": fact.relation, "subject": fact.subject, "answers": list(fact.answers)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and write the three files, and log what was dropped and kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with train/, dev/ and test/ of EntityQuestions")
    parser.add_argument("--to", type=Path, default=FACTS_FOLDER, help="where the files go")
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args(arguments)
    for name, facts in build_facts(options.source, seed=options.seed).items():
        write_jsonl(options.to / f"{name}.jsonl", map(to_row, facts))
        by_relation = Counter(fact.relation for fact in facts)
        counts = ", ".join(f"{relation} {count}" for relation, count in by_relation.items())
        log.info("%s.jsonl: %d facts: %s", name, len(facts), counts)


if __name__ == "__main__":
    setup_logging()
    main()
