"""The seam: what is trained starts exactly where inference starts, and nothing gets lost there."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import build_bpe, build_spaces_in_front
from tokenizers import pre_tokenizers

from sftcore.data.ledger import Change
from sftcore.data.seam import UNTRAINED, Draft, encode_drafts
from sftcore.data.tokens import codec_of

TEXTS = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=30
)
WORDY = st.lists(st.sampled_from([" ", "Paris", "A:", "\n", " is", "北", "京", "ß", "x"]), min_size=1).map(
    "".join
)


def encode(tokenizer, *pieces, is_bare=True):
    codec = codec_of(tokenizer)
    (encoded,) = encode_drafts(codec, [Draft(pieces=pieces, is_bare=is_bare)])
    return encoded


def test_golden_sample_by_hand(words):
    """Ids by WORDS: <s> 1, </s> 2, Q 3, A 4, : 5, ? 6, why 7, so 8."""
    encoded = encode(words, "Q : why ? A :", " so")
    assert encoded.ids == [1, 3, 5, 7, 6, 4, 5, 8, 2]
    assert encoded.labels == [UNTRAINED] * 6 + [8, 2, UNTRAINED]
    assert encoded.num_prompt == 7
    assert encoded.changes == ()


def test_golden_turns_by_hand(words):
    encoded = encode(words, "Q : why ?", " so </s>", " Q :", " not </s>", is_bare=False)
    assert encoded.ids == [3, 5, 7, 6, 8, 2, 3, 5, 10, 2]
    assert encoded.labels == [UNTRAINED] * 3 + [8, 2] + [UNTRAINED] * 2 + [10, 2, UNTRAINED]


def test_a_clean_seam_takes_the_whole(bpe):
    encoded = encode(bpe, "A:", " Paris")
    assert encoded.ids[: encoded.num_prompt] == bpe("A:")["input_ids"]
    assert encoded.ids[:-1] == bpe("A: Paris")["input_ids"]
    assert encoded.changes == ()


def test_a_torn_seam_is_taken_apart(bpe):
    """The case of docs/design.md: " Paris" is one token, so "A: " is no prefix of "A: Paris"."""
    whole, prompt = bpe("A: Paris")["input_ids"], bpe("A: ")["input_ids"]
    assert whole[: len(prompt)] != prompt  # the interesting case occurs
    encoded = encode(bpe, "A: ", "Paris")
    assert encoded.ids == [*prompt, *bpe("Paris")["input_ids"], bpe.eos_token_id]
    assert encoded.num_prompt == len(prompt)
    assert encoded.changes == (Change.SEAM_APART,)


@pytest.mark.parametrize("name", ["bpe", "bpe_bos", "bpe_bos_eos"])
@given(st.one_of(TEXTS, WORDY), st.one_of(TEXTS, WORDY))
def test_trained_ids_are_answer_and_stop_after_what_inference_feeds(request, name, prompt, answer):
    tokenizer = request.getfixturevalue(name)
    codec = codec_of(tokenizer)
    encoded = encode(tokenizer, prompt, answer)
    feed = tokenizer(prompt)["input_ids"][: -1 if name == "bpe_bos_eos" else None]
    assert encoded.ids[: encoded.num_prompt] == feed
    trained = [label for label in encoded.labels if label != UNTRAINED]
    assert trained == encoded.ids[encoded.num_prompt :]
    assert encoded.labels[encoded.num_prompt - 1 : -1] == trained
    assert encoded.labels[-1] == UNTRAINED and len(encoded.labels) == len(encoded.ids)
    assert trained[-1] == codec.stop_id == tokenizer.pad_token_id  # pad = eos, and still trained
    assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == answer + tokenizer.eos_token


@given(st.lists(st.one_of(TEXTS, WORDY), min_size=2, max_size=6).filter(lambda p: len(p) % 2 == 0))
def test_pieces_decode_to_their_texts(bpe, pieces):
    encoded = encode(bpe, *pieces, is_bare=False)
    assert bpe.decode(encoded.ids, clean_up_tokenization_spaces=False) == "".join(pieces)
    trained = [label for label in encoded.labels if label != UNTRAINED]
    assert bpe.decode(trained, clean_up_tokenization_spaces=False) == "".join(pieces[1::2])


def test_bos_and_stop_spelt_out_in_the_text_come_once(bpe_bos):
    encoded = encode(bpe_bos, "<|im_start|>Q", "A<|im_end|>")
    assert encoded.ids.count(bpe_bos.bos_token_id) == encoded.ids.count(bpe_bos.eos_token_id) == 1
    assert encoded.changes == (Change.BOS_IN_TEXT, Change.STOP_IN_TEXT)


def test_pieces_without_tokens_are_refused(words):
    assert encode(words, "Q :", "   ") is None
    assert encode(words, " ", "so", is_bare=False) is None  # nothing would predict the first token
    assert encode(words, " ", "so").ids == [1, 8, 2]  # bos does


def test_a_batch_equals_one_by_one(bpe):
    codec = codec_of(bpe)
    drafts = [Draft(pieces=p, is_bare=True) for p in (("A:", " Paris"), ("A: ", "Paris"), ("x", "y"))]
    assert encode_drafts(codec, drafts) == [encode_drafts(codec, [draft])[0] for draft in drafts]
    assert encode_drafts(codec, []) == []


STRETCHES = ["Where", " is", " it", "a b", " ", "  ", "\n", "?", "'s", "1", "北", "é", "<|im_end|>", ". "]
PHRASES = st.lists(st.sampled_from(STRETCHES), min_size=1, max_size=12).map("".join)


@given(st.lists(PHRASES, min_size=2, max_size=6).filter(lambda p: len(p) % 2 == 0))
@settings(max_examples=400, deadline=None)
def test_encoding_from_the_last_cut_on_changes_nothing(bpe, pieces):
    """The shortcut through spaces between words gives what encoding every prefix whole gives."""
    codec = codec_of(bpe)
    assert codec.is_local
    draft = Draft(pieces=tuple(pieces), is_bare=False)
    assert encode_drafts(codec, [draft]) == encode_drafts(replace(codec, is_local=False), [draft])


def test_the_shortcut_is_taken(bpe):
    codec = codec_of(bpe)
    assert codec.last_cut("Where is it? Yes", 0, 12) == 8  # before " it"
    assert codec.last_cut("Where is it? Yes", 0, 10) == 8
    assert codec.last_cut("Where is it? Yes", 0, 9) == 5  # nothing after the space is known yet
    assert codec.last_cut("Where?", 2, 6) == 2
    assert replace(codec, is_local=False).last_cut("Where is it? Yes", 0, 12) == 0


def test_tokenizers_that_may_look_across_a_space_take_no_shortcut(words):
    assert not codec_of(words).is_local
    for token in ("New York", "Rome", "<|a b|>"):
        tokenizer = build_bpe()
        tokenizer.add_tokens([token])
        assert not codec_of(tokenizer).is_local
    for step in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ):
        tokenizer = build_bpe()
        tokenizer.backend_tokenizer.pre_tokenizer = step
        assert not codec_of(tokenizer).is_local


def test_texts_are_encoded_as_the_tokenizer_itself_does(bpe, words):
    texts = ["Where is Paris?", "", "<|im_end|> x", "why so"]
    for tokenizer in (bpe, words):
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokenizer(texts, truncation=True, max_length=2)  # would stay in force
        assert codec_of(tokenizer).encode(texts) == expected


@pytest.fixture(scope="module")
def sentencepiece():
    return build_spaces_in_front()


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Where ", "Paris"), ("Where is ", "Paris is"), ("北 ", "京"), ("is", " Paris")]
)
def test_an_answers_ids_decode_to_exactly_its_text(sentencepiece, prompt, answer):
    encoded = encode(sentencepiece, prompt, answer)
    (start, end) = encoded.trained[0]
    before, whole = (sentencepiece.decode(encoded.ids[1:n]) for n in (start, end - 1))
    assert whole == " " + prompt + answer and whole[len(before) :] == answer
    assert encoded.ids[: encoded.num_prompt] == sentencepiece(prompt)["input_ids"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["Paris", " is", "is ", "北", " ", "P", "<s>", "</s>"]), min_size=4, max_size=10)
)
def test_so_do_those_of_turns_with_a_torn_seam_between_them(pieces):
    tokenizer = build_spaces_in_front()
    pieces = [pieces[0], *(p if p.strip() else "is" for p in pieces[1:])][: len(pieces) // 2 * 2]
    encoded = encode(tokenizer, *pieces, is_bare=False)
    if encoded is None or encoded.changes == ():
        return
    for (start, end), piece in zip(encoded.trained, pieces[1::2], strict=True):
        text = tokenizer.decode(encoded.ids[start:end])
        assert text.replace("</s> ", "</s>").replace("<s> ", "<s>") == piece


def test_a_vocabulary_without_the_bare_spelling_keeps_the_space(sentencepiece):
    codec = codec_of(sentencepiece)
    assert codec.encode_continued(["Paris", " Paris", "<s>is"]) == [
        sentencepiece.convert_tokens_to_ids(["Paris"]),
        sentencepiece.convert_tokens_to_ids(["▁Paris"]),
        sentencepiece.convert_tokens_to_ids(["<s>", "▁is"]),
    ]


def test_the_stop_token_is_trained_once(bpe):
    for answer in ("yes", "yes<|im_end|>", "yes<|im_end|>\n", "yes<|im_end|> <|im_end|>\n\n"):
        encoded = encode(bpe, "A: ", answer)
        assert bpe.decode(encoded.ids[encoded.num_prompt :]) == "yes<|im_end|>"
    inside = encode(bpe, "A: ", "a<|im_end|>\nb")
    assert bpe.decode(inside.ids[inside.num_prompt :]) == "a<|im_end|>\nb<|im_end|>"


@settings(deadline=None, max_examples=50)
@given(st.lists(TEXTS, min_size=2, max_size=12), st.booleans())
def test_cutting_turns_at_special_tokens_changes_no_id(texts, is_local):
    tokenizer = build_bpe()
    if not is_local:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces = [f"<|im_start|>{text}<|im_end|>" for text in texts[: len(texts) // 2 * 2]]
    encoded = encode(tokenizer, *pieces, is_bare=False)
    assert encoded.ids == tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert encoded.changes == ()


def test_each_turn_of_a_long_chat_is_encoded_a_bounded_number_of_times(bpe):
    codec = codec_of(bpe)
    seen = []
    pieces = tuple("<|im_start|>北京在哪里<|im_end|>" for _ in range(400))
    counted = SimpleNamespace(
        last_added=codec.last_added,
        stop_text=codec.stop_text,
        encode=lambda texts: seen.extend(texts) or codec.encode(texts),
        encode_continued=codec.encode_continued,
        starts_again=codec.starts_again,
    )
    encode_drafts(counted, [Draft(pieces=pieces, is_bare=False)])
    assert sum(map(len, seen)) < 3 * len("".join(pieces))


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Paris</s>", "Paris"), ("Paris", "Pa</s>Paris is"), ("is<s>", " Paris<s>is")]
)
def test_an_added_token_puts_no_space_into_an_answer(prompt, answer):
    codec = codec_of(build_spaces_in_front())
    (found,) = encode_drafts(codec, [Draft(pieces=(prompt, answer), is_bare=True)])
    ((start, end),) = found.trained
    assert codec.tokenizer.decode(found.ids[start:end]) == f"{answer}</s>"
    assert found.ids[:start] == codec.encode_prompts([prompt])[0]
