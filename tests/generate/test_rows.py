"""Decoding in batches and scoring in packs: each text as if it were alone, or refused by name."""

from __future__ import annotations

import logging

import pytest
import torch
from families import REFUSED, full_config_of, model_of, save_family
from transformers import AutoModelForCausalLM

from sftcore.config import ModelSettings
from sftcore.errors import UserInputError
from sftcore.generate.api import Decoding
from sftcore.generate.decode import decode_batch
from sftcore.generate.prefix_cache import CachedRows
from sftcore.generate.rows import lone_or_cached_rows
from sftcore.generate.score import Question, continuation_scores, load_for_scoring
from sftcore.model.miniature import build, shrink
from sftcore.model.trial import bound_length

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [8], [9, 10, 11], [21, 22, 23]]
NEVER: frozenset[int] = frozenset()
FACTORS = {"short_factor": [1.0 + i / 4 for i in range(48)], "long_factor": [4.0 + i for i in range(48)]}
LONG_ROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
LONG_ROPE |= {"factor": 32.0}
MIXING = ("mamba", "bamba", "jamba", "lfm2", "rwkv", "bloom", "gptj", "openai-gpt", "recurrent_gemma", "mpt")
PLAIN = ("llama", "gpt2", "mixtral", "cohere", "gemma3_text", "gemma4_text", "stablelm")


@torch.inference_mode()
def greedy(model, prompt: list[int], count: int) -> list[int]:
    """By transformers' own code, the whole text for each token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


def check_decoding(model, count: int = 5) -> None:
    together = decode_batch(model, PROMPTS, Decoding(max_new_tokens=count, stop_ids=NEVER))
    assert together == [greedy(model, prompt, count) for prompt in PROMPTS]


@pytest.mark.parametrize("name", [*MIXING, *PLAIN])
def test_texts_are_decoded_as_if_alone(name):
    check_decoding(model_of(name))


def test_what_a_cache_would_get_wrong_is_read_whole(caplog):
    with caplog.at_level(logging.WARNING):
        rows = lone_or_cached_rows(model_of("recurrent_gemma"), PROMPTS)
    assert not isinstance(rows, CachedRows) and "reads whole texts for every token" in caplog.text
    assert isinstance(lone_or_cached_rows(model_of("llama"), PROMPTS), CachedRows)


def test_texts_on_both_sides_of_a_length_are_decoded_as_if_alone():
    """LongRoPE goes by the longest text of a forward: here from 8 tokens on."""
    config = shrink(full_config_of("phi3", rope_parameters=LONG_ROPE, max_position_embeddings=131072))
    model = build(config, AutoModelForCausalLM, attn_implementation="eager")
    assert bound_length(config) == 8 and bound_length(full_config_of("mistral")) is None
    assert {len(prompt) + 5 > 8 for prompt in PROMPTS} == {True, False}
    check_decoding(model)


@pytest.mark.parametrize(
    "name",
    ["mamba", "rwkv", "bamba", "lfm2", "bloom", "bart", "falcon", "gptj", "gpt_neo", "mpt"]
    + ["nemotron", "stablelm", "deepseek_v32", "modernbert-decoder", "cohere", "doge"],
)
def test_labels_are_not_scored_for_the_reason_that_training_gives(tmp_path, name):
    save_family(name, tmp_path)
    told = f"labels can't be scored with this model: .*{REFUSED[name]}"
    with pytest.raises(UserInputError, match=told) as refused:
        load_for_scoring(ModelSettings(path=str(tmp_path), dtype="float32"))
    assert "train" not in str(refused.value) and "object has no attribute" not in str(refused.value)


def test_labels_of_texts_beyond_a_length_are_not_scored(tmp_path):
    config = shrink(full_config_of("phi3", rope_parameters=LONG_ROPE, max_position_embeddings=131072))
    build(config, AutoModelForCausalLM).save_pretrained(tmp_path)
    model = load_for_scoring(ModelSettings(path=str(tmp_path), dtype="float32"))
    short = [Question(prompt=[5, 6, 7], continuations=([8, 9], [10]))]
    assert len(continuation_scores(model, short)[0]) == 2
    with pytest.raises(UserInputError, match="(?s)labels can't be scored.*a text of 9 tokens.*at most 8"):
        continuation_scores(model, [*short, Question(prompt=list(range(5, 12)), continuations=([8, 9],))])
