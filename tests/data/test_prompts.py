"""Records -> samples: what the model sees is what inference feeds, and the answer is never cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import build_bpe, build_nfkc

from sftcore.data.ledger import Change, Ledger, Reason, Rejection
from sftcore.data.prompts import Sample
from sftcore.data.records import Chat, Completion, Fact, Message, Pair
from sftcore.errors import UserInputError

QUESTION = Fact(relation="P1", subject="Ann", answers=("Paris", "Lutetia"), question="Where is Ann?")
PAIR = Pair(a="你好", b="您好", label=1)
TEXTS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=40)


def trained_text(tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.labels[sample.labels != -100], clean_up_tokenization_spaces=False)


def text(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_fact_by_hand(words, make_prompter, record_of):
    prompter = make_prompter(words, ("Q : {question} A :", " {answer}"))
    fact = Fact(relation="P1", subject="s", answers=("because", "so"), question="why ?")
    sample = prompter.sample(record_of(fact, id="w:3", row=3))
    assert sample.input_ids.tolist() == [1, 3, 5, 7, 6, 4, 5, 9, 2]
    assert sample.labels.tolist() == [-100] * 6 + [9, 2, -100]
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert (sample.id, sample.num_trained, sample.file, sample.row) == ("w:3", 2, "r.jsonl", 3)


def test_the_first_answer_is_trained_in_the_papers_form(bpe, make_prompter, record_of):
    sample = make_prompter(bpe).sample(record_of(QUESTION))
    assert text(bpe, sample.input_ids) == "<|question|> Where is Ann? <|answer|> Paris<|im_end|>"
    assert trained_text(bpe, sample) == " Paris<|im_end|>"


def test_the_relations_pattern_stands_in_for_a_missing_question(bpe, make_prompter, record_of):
    prompter = make_prompter(bpe, patterns={"P1": "Where is {subject}?"})
    bare = Fact(relation="P1", subject="Ann", answers=("Paris",))
    assert prompter.prompt_text(record_of(bare)) == prompter.prompt_text(record_of(QUESTION))


def test_a_relation_without_pattern_is_rejected(bpe, make_prompter, record_of):
    record = record_of(Fact(relation="P9", subject="Ann", answers=("x",)))
    rejection = make_prompter(bpe).sample(record)
    assert (rejection.reason, rejection.row) == (Reason.UNKNOWN_RELATION, 1)
    assert "no question, and no pattern for relation 'P9'" in rejection.detail
    with pytest.raises(UserInputError, match="r.jsonl:1: no prompt can be made: no question"):
        make_prompter(bpe).prompt_ids(record)
    about_subject = make_prompter(bpe, ("{subject} is in", " {answer}"))
    assert about_subject.prompt_text(record) == "Ann is in"


@pytest.mark.parametrize("label", [0, 1])
def test_a_pair_gets_the_label_word_of_its_language(bpe, make_prompter, record_of, label):
    prompter = make_prompter(bpe, ("{a}|{b}|{label_0}|{label_1}:\n", "{label}"), task="matching")
    for a, word, both in (
        ("你好", ("不同", "相同"), "不同|相同"),
        ("hi", ("different", "same"), "different|same"),
    ):
        record = record_of(Pair(a=a, b=a, label=label))
        sample = prompter.sample(record)
        assert trained_text(bpe, sample) == word[label] + "<|im_end|>"
        assert prompter.prompt_text(record) == f"{a}|{a}|{both}:\n"
        assert prompter.answer_text(record) == word[label]
        ids = prompter.label_ids_batch([record])[0]
        assert [text(bpe, i) for i in ids] == [w + "<|im_end|>" for w in word]
        assert sample.input_ids.tolist() == prompter.prompt_ids(record) + ids[label]


def test_completions_are_verbatim(bpe, make_prompter, record_of):
    sample = make_prompter(bpe).sample(record_of(Completion(prompt="{question} ", completion="\n{answer} ")))
    assert text(bpe, sample.input_ids) == "{question} \n{answer} <|im_end|>"


@pytest.mark.parametrize("name", ["bpe", "bpe_bos", "bpe_bos_eos"])
@given(TEXTS, TEXTS)
@settings(max_examples=50)
def test_samples_start_with_what_inference_feeds(request, name, make_prompter, record_of, prompt, answer):
    tokenizer = request.getfixturevalue(name)
    prompter = make_prompter(tokenizer)
    for content in (
        Completion(prompt=prompt, completion=answer),
        Fact(relation="P1", subject="s", answers=(answer,), question=prompt),
    ):
        record = record_of(content)
        sample, prompt_ids = prompter.sample(record), prompter.prompt_ids(record)
        assert sample.input_ids[: len(prompt_ids)].tolist() == prompt_ids
        assert len(prompt_ids) + sample.num_trained == len(sample.input_ids)
        assert sample.labels[-1] == -100 and (sample.labels[: len(prompt_ids) - 1] == -100).all()
        assert trained_text(tokenizer, sample).endswith(answer + tokenizer.eos_token)


def test_chats_train_assistant_turns_only(chatml, make_prompter, record_of):
    turns = (("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "bye"))
    record = record_of(Chat(messages=tuple(Message(role=r, content=c) for r, c in turns)))
    prompter = make_prompter(chatml, task="chat")
    sample = prompter.sample(record)
    assert trained_text(chatml, sample) == "yo<|im_end|>bye<|im_end|>"
    prompt_ids = prompter.prompt_ids(record)
    assert sample.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert text(chatml, prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_that_the_template_refuses_is_rejected(chatml, make_prompter, record_of):
    picky = build_bpe()
    picky.chat_template = (
        "{% if messages|length > 4 %}{{ raise_exception('long') }}{% endif %}" + chatml.chat_template
    )
    turns = tuple(Message(role=r, content="x") for r in ("user", "assistant") * 3)
    rejection = make_prompter(picky, task="chat").sample(record_of(Chat(messages=turns)))
    assert (rejection.reason, rejection.detail) == (Reason.REFUSED_BY_TEMPLATE, "the template says: long")


def test_answers_without_tokens_are_rejected(words, make_prompter, record_of):
    rejection = make_prompter(words).sample(record_of(Completion(prompt="Q", completion="\u00a0")))
    assert rejection.reason is Reason.NO_TOKENS


def test_alterations_are_counted(bpe, make_prompter, record_of):
    ledger = Ledger()
    prompter = make_prompter(bpe)
    contents = [Completion(prompt="A: ", completion=c) for c in ("Paris", "Paris<|im_end|>")]
    samples = list(prompter.samples([record_of(c, row=i) for i, c in enumerate(contents)], ledger))
    counts = {Change.SEAM_APART: 2, Change.STOP_IN_TEXT: 1, Change.SPECIAL_IN_TEXT: 1}
    assert ledger.altered_by_reason == counts
    assert samples[0].input_ids.tolist() == samples[1].input_ids.tolist()


def test_many_records_in_batches_equal_one_by_one(bpe, make_prompter, record_of, monkeypatch):
    monkeypatch.setattr("sftcore.data.prompts.BATCH_RECORDS", 3)
    prompter, ledger = make_prompter(bpe, max_length=30), Ledger()
    records = [record_of(Completion(prompt="x" * n, completion="y"), id=str(n)) for n in range(20, 40, 2)]
    samples = list(prompter.samples(iter(records), ledger))
    alone = [prompter.sample(record) for record in records]
    kept = [sample for sample in alone if isinstance(sample, Sample)]
    assert 0 < len(samples) < len(records)
    assert [s.input_ids.tolist() for s in samples] == [s.input_ids.tolist() for s in kept]
    assert ledger.rejected_by_reason == {Reason.OVERLENGTH: len(records) - len(samples)}


def test_overlong_samples_are_rejected_with_both_numbers(bpe, make_prompter, record_of):
    record = record_of(QUESTION)
    num_tokens = len(make_prompter(bpe).sample(record).input_ids)
    assert isinstance(make_prompter(bpe, max_length=num_tokens).sample(record), Sample)
    for overlength in ("reject", "error"):
        prompter = make_prompter(bpe, max_length=num_tokens - 1, overlength=overlength)
        rejection = prompter.sample(record)
        assert rejection.reason is Reason.OVERLENGTH
        assert rejection.detail == f"{num_tokens} tokens, {num_tokens - 1} fit"


LONG = "one two three four five six seven eight nine ten where is Paris?"


@pytest.mark.parametrize(
    ("content", "task", "template", "kept"),
    [
        (
            Fact(relation="P1", subject="s", answers=("Rome",), question=LONG),
            "qa",
            "qa-plain",
            "<|question|> ",
        ),
        (Completion(prompt=LONG, completion=" Rome"), "qa", "qa-plain", ""),
        (Pair(a=LONG, b="short", label=1), "matching", "matching-concise-en", "Text 1: "),
    ],
)
def test_trimming_cuts_the_prompts_text_only(
    bpe_bos, make_prompter, record_of, content, task, template, kept
):
    record, ledger = record_of(content), Ledger()
    whole = make_prompter(bpe_bos, template, task=task).sample(record)
    max_length = len(whole.input_ids) - 10
    sample = make_prompter(
        bpe_bos, template, task=task, max_length=max_length, overlength="trim_prompt"
    ).sample(record, ledger)
    assert max_length - 3 <= len(sample.input_ids) <= max_length
    assert sample.input_ids[0] == bpe_bos.bos_token_id
    assert trained_text(bpe_bos, sample) == trained_text(bpe_bos, whole)
    left = text(bpe_bos, sample.input_ids[1:])
    assert left.startswith(kept) and LONG not in left and "is Paris?" in left
    assert left.removeprefix(kept)[:5] != LONG[:5]
    assert ledger.altered_by_reason == {Change.PROMPT_TRIMMED: 1}


def test_trimming_a_chat_keeps_template_and_answers(chatml, make_prompter, record_of):
    turns = (("user", LONG), ("assistant", "yo"), ("user", "so"), ("assistant", "bye"))
    record = record_of(Chat(messages=tuple(Message(role=r, content=c) for r, c in turns)))
    whole = make_prompter(chatml, task="chat").sample(record)
    max_length = len(whole.input_ids) - 20
    sample = make_prompter(chatml, task="chat", max_length=max_length, overlength="trim_prompt").sample(
        record
    )
    assert len(sample.input_ids) <= max_length
    assert trained_text(chatml, sample) == "yo<|im_end|>bye<|im_end|>"
    assert "Paris?<|im_end|>" in text(chatml, sample.input_ids) and LONG not in text(chatml, sample.input_ids)


@pytest.mark.parametrize("overlength", ["reject", "trim_prompt", "error"])
def test_an_answer_that_is_too_long_alone_is_always_rejected(bpe, make_prompter, record_of, overlength):
    prompter = make_prompter(bpe, max_length=10, overlength=overlength)
    rejection = prompter.sample(record_of(Completion(prompt="Q: why?", completion="x" * 30)))
    assert isinstance(rejection, Rejection) and rejection.reason is Reason.OVERLENGTH
    assert ("alone are too long" in rejection.detail) == (overlength == "trim_prompt")


@given(st.integers(4, 40), TEXTS, st.text("ab ", min_size=1, max_size=10).filter(str.strip))
@settings(max_examples=60)
def test_trimmed_samples_fit_and_keep_the_answer(make_prompter, record_of, bpe, max_length, prompt, answer):
    prompter = make_prompter(bpe, max_length=max_length, overlength="trim_prompt")
    result = prompter.sample(record_of(Completion(prompt=prompt, completion=answer)))
    if isinstance(result, Rejection):
        shortest = Completion(prompt=prompt[-1:], completion=answer)
        assert isinstance(prompter.sample(record_of(shortest)), Rejection)
    else:
        assert len(result.input_ids) <= max_length
        assert trained_text(bpe, result) == answer + bpe.eos_token


ODD = ("\ufb01ne", "\uff21\uff11", "a\u2581b", "a\u00a0b", "a  b", "e\u0301")
EVEN = ("fine", " a ", "a\x07b", "a\tb", "a\r\nb", "\u00e9", "\u5317\u4eac", "a\u200bb")


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(("answer", "is_altered"), [*((a, True) for a in ODD), *((a, False) for a in EVEN)])
def test_answers_that_the_tokenizer_makes_another_text_of_are_counted(
    make_prompter, kind, answer, is_altered
):
    tokenizer = build_nfkc()
    turns = (Message(role="user", content="hi"), Message(role="assistant", content=answer))
    content = Chat(messages=turns) if kind == "chat" else Completion(prompt="hi:", completion=answer)
    prompter = make_prompter(tokenizer, task="chat" if kind == "chat" else "qa")
    (sample,) = prompter.encode_batch([content])
    assert (Change.ANSWER_NORMALISED in sample.changes) is is_altered
    start, end = sample.trained[-1]
    read = tokenizer.decode(
        sample.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert (read != answer) is is_altered
