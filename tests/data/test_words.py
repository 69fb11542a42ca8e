"""ASCII texts word by word: the ids are the tokenizer's own, whatever stands in the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaged import packaged_model
from tiny_tokenizers import build_bpe
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

import sftcore.data.words as words_module
from sftcore.data.tokens import codec_of, load_tokenizer
from sftcore.data.words import LLAMA3_SPLIT, QWEN_SPLIT, Words, word_pattern

PIECES = [
    *("Where", " is", "Paris", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "?", ".", "...", "_"),
    *(
        "'s",
        "'S",
        "'ll",
        "'",
        "x'",
        "1",
        " 1",
        "1984",
        "12345678",
        "a1b",
        "$3.50",
        "<|",
        "<|im_end|>",
        "é",
        "北",
    ),
]
TEXTS = st.lists(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join), max_size=5
)


def split_and_bytes(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits_and_bytes(individual: bool = True):
    digits = pre_tokenizers.Digits(individual_digits=individual)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


STEPS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": digits_and_bytes(),
    "llama3": split_and_bytes(LLAMA3_SPLIT),
    "qwen": split_and_bytes(QWEN_SPLIT),
}


def backend_with(steps, normalizer=None):
    backend = build_bpe().backend_tokenizer
    backend.pre_tokenizer = steps
    backend.normalizer = normalizer
    return backend


@pytest.fixture(scope="module", params=STEPS)
def backend(request):
    return backend_with(STEPS[request.param], normalizers.NFC() if request.param == "qwen" else None)


def ids_of(backend, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


@given(TEXTS)
@settings(max_examples=1500, deadline=None)
def test_ids_are_those_of_the_tokenizer(backend, texts):
    words = Words(backend, word_pattern(backend))
    expected = ids_of(backend, texts)
    assert words.encode(texts) == expected
    assert words.encode(texts[::-1]) == expected[::-1], "words met before"


def test_known_words_are_not_encoded_again(backend, monkeypatch):
    class Recording:
        asked: list[str] = []

        def encode_batch_fast(self, texts, **options):
            self.asked += texts
            return backend.encode_batch_fast(texts, **options)

        def __getattr__(self, name):
            return getattr(backend, name)

    words = Words(recording := Recording(), word_pattern(backend))
    words.encode(["Where is Paris?", "Where is Rome?", "où?", "<|im_end|>"])
    assert sorted(recording.asked) == sorted(["Where", " is", " Paris", " Rome", "?", "où?", "<|im_end|>"])
    recording.asked.clear()
    assert words.encode(["Paris is where? Rome"]) == ids_of(backend, ["Paris is where? Rome"])
    assert sorted(recording.asked) == ["Paris", " where"][::-1]


def test_an_added_token_is_found_in_its_normalised_form():
    backend = backend_with(STEPS["gpt2"], normalizers.NFKC())
    backend.add_tokens([AddedToken("①", normalized=True)])
    words, texts = Words(backend, word_pattern(backend)), ["a1b", "a2b", "①"]
    assert words.encode(texts) == ids_of(backend, texts)
    assert backend.token_to_id("①") in words.encode(["a1b"])[0], "else it shows nothing"


def test_memory_is_bounded(backend, monkeypatch):
    monkeypatch.setattr(words_module, "MOST_WORDS", 4)
    words = Words(backend, word_pattern(backend))
    texts = [f"{a} {b} {'long' * 40}" for a in "abcdef" for b in "xyz"]
    for text in texts * 2:
        assert words.encode([text]) == ids_of(backend, [text])
        assert len(words._ids) <= 4 and all(len(word) <= words_module.MOST_CHARACTERS for word in words._ids)


@pytest.mark.parametrize(
    ("steps", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (digits_and_bytes(individual=False), None),
        (split_and_bytes(r"\p{Lu}?\p{L}+|\s"), None),
        (pre_tokenizers.Metaspace(), None),
        (None, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    ],
)
def test_other_tokenizers_are_left_alone(steps, normalizer):
    backend = backend_with(steps, normalizer)
    assert word_pattern(backend) is None
    dropping = backend_with(STEPS["gpt2"])
    dropping.model.dropout = 0.1
    assert word_pattern(dropping) is None


@pytest.fixture(scope="module")
def smollm2():
    return codec_of(load_tokenizer(str(packaged_model("smollm2-135m"))))


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=1000, deadline=None)
def test_real_vocabulary(smollm2, texts):
    backend = smollm2.tokenizer.backend_tokenizer
    assert word_pattern(backend) is not None
    assert smollm2.encode(texts) == ids_of(backend, texts)
