"""The outside corpora that the papers use, read as a user would (skipped without SFTCORE_TEST_DATA)."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from sftcore.config import Source
from sftcore.data.filters import judge
from sftcore.data.ledger import Reason
from sftcore.data.records import Record, read_source
from sftcore.settings import LabelWords
from sftcore.tasks.kinds.pair import language_of

DATA = Path(os.environ.get("SFTCORE_TEST_DATA", "nowhere"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="SFTCORE_TEST_DATA is not set")


def rows(format: str, path: str, **more) -> list:
    source = Source(format=format, path=str(DATA / path), **more)
    return list(read_source(source, split="train", labels=LabelWords()))


def questions(split: str, relation: str = "P*") -> list:
    return rows("entityquestions", f"entityquestions/{split}/{relation}.{split}.json")


def test_entityquestions_is_read_whole():
    train, test = questions("train"), questions("test")
    assert (len(train), len(test)) == (176_560, 22_075)
    assert all(isinstance(row, Record) for row in train + test)
    assert len({row.content.relation for row in train}) == 24
    assert all(row.content.subject in row.content.question for row in train)


def test_training_questions_that_are_tested_too_are_leaks():
    train, test = questions("train"), questions("test")
    tested = {row.content.question for row in test}
    shared = [row for row in train if row.content.question in tested]
    assert len({row.content.question for row in shared}) == 368  # data/README.md
    leaks = {row.id for row, verdict in zip(train, judge(train, test), strict=True) if verdict is Reason.LEAK}
    assert {row.id for row in shared} <= leaks
    assert len(leaks) == 583  # 577 rows have one of the 368 questions, 6 differ in case


def test_two_relations_with_one_question_pattern_leak_into_each_other():
    train, test = questions("train", "P131"), questions("test", "P276")
    tested = {row.content.question for row in test}
    leaks = [v for v in judge(train, test) if v is Reason.LEAK]
    assert len(leaks) == sum(row.content.question in tested for row in train) > 0


def test_pawsx_is_chinese_and_partly_contradictory():
    dev, test = (rows("pairs", f"pawsx_zh/{split}_2k.tsv") for split in ("dev", "test"))
    assert (len(dev), len(test)) == (2000, 2000)
    lines = [
        x for s in ("dev", "test") for x in (DATA / f"pawsx_zh/{s}_2k.tsv").read_bytes().split(b"\n")[1:]
    ]
    assert [str(row.content.label) for row in dev + test] == [x.decode()[-1] for x in lines if x]
    languages = Counter(language_of(row.content, "auto") for row in dev + test)
    assert languages == {"zh": 3995, "en": 5}  # five pairs hold names and numbers only
    verdicts = Counter(judge(dev, test))
    assert (verdicts[Reason.LEAK], verdicts[Reason.CONTRADICTORY_LABEL]) == (26, 4)


def test_gsm8k_as_jsonl(tmp_path):
    lines = (DATA / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    given = [json.loads(line) for line in lines]
    path = tmp_path / "gsm8k.jsonl"
    converted = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in given]
    path.write_text("".join(json.dumps(row) + "\n" for row in converted))
    read = list(read_source(Source(format="jsonl", path=str(path)), split="train", labels=LabelWords()))
    assert [row.content.completion for row in read] == [row["answer"] for row in given]
    assert len(read) == 1319
