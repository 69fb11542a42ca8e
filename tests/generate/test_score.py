"""Scores in trees equal each text alone in plain transformers: states, log-likelihoods, classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sftcore.config import ModelSettings
from sftcore.errors import UserInputError
from sftcore.generate.score import (
    Question,
    class_logits,
    continuation_scores,
    load_for_scoring,
    pack_questions,
    shared_tokens,
)

RNG = np.random.default_rng(0)
PREFIX = RNG.integers(1, 300, 6).tolist()


def question(length: int, *continuations: int, prefix=PREFIX) -> Question:
    draw = lambda n: RNG.integers(1, 300, n).tolist()  # noqa: E731
    return Question(prompt=[*prefix, *draw(length)], continuations=tuple(draw(n) for n in continuations))


QUESTIONS = [question(3, 1, 2), question(7, 2, 3), question(3, 1, 2), question(1, 4, 1), question(9, 2, 2)]


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(tmp_path)
    return tmp_path


def alone(model, prompt: list[int], continuation: list[int]) -> list[float]:
    """Log-likelihoods of a continuation's tokens by transformers itself."""
    ids = [*prompt, *continuation]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(continuation)]


@pytest.mark.parametrize("capacity", [4096, 30, 8])
def test_label_scores_equal_each_text_alone(folder, capacity):
    """With a sliding window of 4 (Gemma-3) a continuation's window reaches over the fork into its prompt."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_for_scoring(ModelSettings(path=str(folder), dtype="float32"))
    packs = list(pack_questions(QUESTIONS, capacity=capacity))
    assert len(packs) == {4096: 1, 30: 2, 8: 5}[capacity]
    found = continuation_scores(ours, QUESTIONS, capacity=capacity)
    for q, scores in zip(QUESTIONS, found, strict=True):
        for continuation, tokens in zip(q.continuations, scores, strict=True):
            assert tokens == pytest.approx(alone(theirs, q.prompt, continuation), abs=2e-4)
    assert len({round(sum(tokens), 3) for scores in found for tokens in scores}) == 10, "all differ"


def test_classes_equal_transformers_own_classifier(folder):
    torch.manual_seed(1)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    theirs.save_pretrained(folder)
    ours = load_for_scoring(ModelSettings(path=str(folder), dtype="float32"), classifies=True)
    prompts = [Question(prompt=q.prompt) for q in QUESTIONS]
    found = class_logits(ours, prompts, capacity=30)
    for q, logits in zip(prompts, found, strict=True):
        with torch.no_grad():
            assert logits == pytest.approx(theirs(torch.tensor([q.prompt])).logits[0].tolist(), abs=1e-4)


def test_another_continuation_changes_no_bit(folder):
    model = load_for_scoring(ModelSettings(path=str(folder), dtype="float32"))
    first, second = [5, 6, 7], [8, 9, 10]
    one = Question(prompt=[1, 2, 3], continuations=(first, second))
    other = Question(prompt=[1, 2, 3], continuations=(first, second[::-1]))
    (before,), (after,) = continuation_scores(model, [one]), continuation_scores(model, [other])
    assert before[0] == after[0] and before[1] != after[1]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=20),
    st.integers(1, 60),
)
def test_every_question_is_in_one_pack_and_computed_once(shapes, capacity):
    questions = [question(n, *branches) for n, *branches in shapes]
    packs = list(pack_questions(questions, capacity=capacity))
    assert sorted(i for pack in packs for i in pack.numbers) == list(range(len(questions)))
    for pack in packs:
        size = sum(fork.num_tokens for fork in pack.tree.forks)
        assert len(pack.input_ids) == len(pack.position_ids) == size
        assert size <= capacity + len(PREFIX) + 1 or len(pack.numbers) == 1
        for i, places in zip(pack.numbers, pack.asked, strict=True):
            for continuation, place in zip(questions[i].continuations, places, strict=True):
                assert [pack.input_ids[p] for p in place] == [questions[i].prompt[-1], *continuation[:-1]]


def test_what_prompts_begin_with_is_computed_once(folder):
    """Prompts that part again and again, one that another goes on from, and one that is asked twice."""
    a, b, c = (RNG.integers(1, 300, n).tolist() for n in (4, 5, 6))
    prompts = [a, a + b, a + b + c, a + b + [7], a + c, a + c, c]
    questions = [Question(prompt=prompt, continuations=([3, 4], [5])) for prompt in prompts]
    (pack,) = pack_questions(questions)
    distinct = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert len(pack.input_ids) == len(distinct) + 1 + len(prompts), (
        "one twice, and a branch of one token each"
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_for_scoring(ModelSettings(path=str(folder), dtype="float32"))
    for q, scores in zip(questions, continuation_scores(ours, questions), strict=True):
        for continuation, tokens in zip(q.continuations, scores, strict=True):
            assert tokens == pytest.approx(alone(theirs, q.prompt, continuation), abs=2e-4)


def test_a_long_common_beginning_is_computed_once_a_pack_of_many():
    """As long as a pack: few-shot prompts."""
    common = RNG.integers(1, 300, 60).tolist()
    questions = [question(5, 1, 1, prefix=common) for _ in range(40)]
    packs = list(pack_questions(questions, capacity=60))
    assert len(packs) <= 4 and sum(len(pack.input_ids) for pack in packs) <= 40 * 5 + len(packs) * 60


def test_a_prompt_keeps_its_last_token():
    assert shared_tokens([1, 2, 3], [1, 2, 3]) == 2
    assert shared_tokens([1, 2], [1, 2, 3]) == 2
    assert shared_tokens([1], [1]) == 0


def test_a_model_that_edits_its_logits_is_refused(tmp_path):
    from tiny import TINY
    from transformers import GraniteConfig

    config = GraniteConfig(**TINY, tie_word_embeddings=True, logits_scaling=4.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserInputError, match="changes its logits.*\n.*predict: generate"):
        load_for_scoring(ModelSettings(path=str(tmp_path), dtype="float32"))
