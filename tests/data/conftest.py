"""Fixtures of the data tests: tokenizers, files, sources read with every row accounted for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, build_bpe, build_words

from sftcore.config import InlineTemplate, Source
from sftcore.data.ledger import Ledger, Rejection
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record, read_source
from sftcore.data.wording import load_template
from sftcore.settings import LabelWords, MatchingSettings


@pytest.fixture(scope="session")
def bpe():
    return build_bpe()


@pytest.fixture(scope="session")
def bpe_bos():
    return build_bpe(bos=True)


@pytest.fixture(scope="session")
def bpe_bos_eos():
    return build_bpe(bos=True, eos=True)


@pytest.fixture(scope="session")
def words():
    return build_words()


@pytest.fixture(scope="session")
def chatml():
    tokenizer = build_bpe()
    tokenizer.chat_template = CHATML
    return tokenizer


def build_prompter(
    tokenizer, template="qa-plain", *, task="qa", max_length=4096, overlength="reject", patterns=None
):
    """A `Prompter`; the template is a name, or (prompt, completion)."""
    if isinstance(template, tuple):
        template = InlineTemplate(prompt=template[0], completion=template[1])
    templates = {} if task == "chat" else {"any": load_template(template, task=task)}
    options = PromptOptions(
        task=task,
        templates=templates,
        matching=MatchingSettings(),
        max_length=max_length,
        overlength=overlength,
    )
    return Prompter(options, tokenizer, patterns or {})


def wrap(content, *, id="r:1", row=1, split="train"):
    """A `Record` of `content`."""
    return Record(id=id, split=split, file="r.jsonl", row=row, content=content)


@pytest.fixture(scope="session")
def make_prompter():
    return build_prompter


@pytest.fixture(scope="session")
def record_of():
    return wrap


@pytest.fixture
def write(tmp_path):
    """Writes text, bytes or rows (as JSON lines) to a file of `tmp_path`, through gzip for .gz."""

    def make(name: str, content) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return make


@pytest.fixture
def read():
    """Reads a source; returns records, rejections and the ledger, after checking that no row got lost."""

    def make(format: str, path, **settings):
        ledger = Ledger()
        source = Source(format=format, path=str(path), **settings)
        rows = list(read_source(source, split="train", labels=LabelWords(), ledger=ledger))
        records = list(ledger.take(rows))
        rejections = [row for row in rows if isinstance(row, Rejection)]
        assert ledger.num_rows_read == len(records) + ledger.num_rejected
        assert ledger.num_rejected == len(rejections)
        return records, rejections, ledger

    return make
