"""Tiny tokenizers built in code, one per trap: pad = eos, automatic bos, automatic eos, whole words, chat."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sftcore.config import LabelWords, MatchingSettings, Source
from sftcore.data.ledger import Ledger, Rejection
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record, read_source
from sftcore.data.wording import load_template

TEXT = [
    "Q: Where is Paris? A: Paris is in France.",
    "Question: Who was born in Rome? Answer: Paris, Rome, London",
    "<|question|> Where is it? <|answer|> Paris",
    "user assistant system You are a helpful assistant",
    "句子 不同 相同 北京 上海",
] * 3
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["[UNK]", "<s>", "</s>", "Q", "A", ":", "?", "why", "so", "because", "not"]


def build_bpe(*, bos: bool = False, eos: bool = False, with_eos_token: bool = True):
    """Byte-level BPE in which " Paris" is one token; pad is eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos or eos:
        single = ["<|im_start|>"] * bos + ["$A"] + ["<|im_end|>"] * eos
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    end = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if with_eos_token else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", **end)


def build_words():
    """One id a word, in the order of WORDS; adds <s> by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


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


@pytest.fixture
def make_prompter():
    """Builds a `Prompter`; the template is a name, or (prompt, completion)."""

    def make(
        tokenizer, template="qa-plain", *, task="qa", max_length=4096, overlength="reject", patterns=None
    ):
        from sftcore.config import InlineTemplate

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
        return Prompter(options, tokenizer, {} if patterns is None else patterns)

    return make


@pytest.fixture
def record_of():
    """Wraps a content in a `Record`."""

    def make(content, *, id="r:1", row=1, split="train"):
        return Record(id=id, split=split, file="r.jsonl", row=row, content=content)

    return make


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
