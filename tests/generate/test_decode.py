"""Batched decoding equals transformers' generate; sampling follows the softmax; stopping is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from sftcore.generate import decode
from sftcore.generate.api import Decoding, batches_by_length
from sftcore.generate.decode import decode_batch, pick_tokens

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
NEVER = frozenset([299])


def build(kind: str):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
def test_greedy_equals_generate_prompt_by_prompt(kind):
    model = build(kind)
    found = decode_batch(model, PROMPTS, Decoding(max_new_tokens=8, stop_ids=NEVER))
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=299
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert model.config._attn_implementation == "eager", "the model is left as it was"


def test_prompts_of_one_token_need_no_prefix():
    model = build("llama")
    together = decode_batch(model, PROMPTS, Decoding(max_new_tokens=5, stop_ids=NEVER))
    assert decode_batch(model, [[8]], Decoding(max_new_tokens=5, stop_ids=NEVER)) == [together[1]]


def test_a_row_is_the_same_whatever_the_other_rows_do():
    model = build("llama")
    uniforms = np.random.default_rng(3).random((24, 8))
    options = {"max_new_tokens": 8, "stop_ids": NEVER, "completions_per_prompt": 6}
    options |= {"temperature": 1.5, "uniforms": uniforms}
    free = decode_batch(model, PROMPTS, Decoding(**options))
    assert len({tuple(tokens) for tokens in free}) > 12, "completions part"

    def is_cut(prompt: int, tokens: list[int]) -> bool:
        return prompt % 2 == 0 and len(tokens) == 2 + tokens[0] % 3

    def cut(prompts, tokens):
        return [is_cut(*pair) for pair in zip(prompts, tokens, strict=True)]

    cut_short = decode_batch(model, PROMPTS, Decoding(**options, is_done=cut))
    for row, (some, whole) in enumerate(zip(cut_short, free, strict=True)):
        length = next((n for n in range(1, 9) if is_cut(row // 6, whole[:n])), 8)
        assert some == whole[:length]
    assert sum(len(some) < len(whole) for some, whole in zip(cut_short, free, strict=True)) > 6


def test_completions_of_a_prompt_are_asked_about_once_while_they_go_the_same_way():
    model, asked = build("llama"), []

    def look(prompts, tokens):
        asked.append([(prompt, tuple(t)) for prompt, t in zip(prompts, tokens, strict=True)])
        return [False] * len(prompts)

    decode_batch(
        model, PROMPTS, Decoding(max_new_tokens=3, stop_ids=NEVER, completions_per_prompt=5, is_done=look)
    )  # greedy: the five never part
    assert [len(step) for step in asked] == [4, 4, 4] and len(set(asked[0])) == 4


def test_a_completion_ends_before_its_stop_token():
    model = build("llama")
    whole = decode_batch(model, PROMPTS, Decoding(max_new_tokens=8, stop_ids=NEVER))
    stop = whole[0][3]
    stopped = decode_batch(model, PROMPTS, Decoding(max_new_tokens=8, stop_ids=frozenset([stop])))
    assert stopped[0] == whole[0][: whole[0].index(stop)]
    assert all(stop not in tokens for tokens in stopped)


def test_uniforms_pick_tokens_in_proportion_to_the_tempered_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -5.0]]).repeat(20_000, 1)
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    counts = np.bincount(pick_tokens(logits, 0.7, uniforms), minlength=4) / 20_000
    expected = torch.softmax(logits[0] / 0.7, -1).numpy()
    assert np.abs(counts - expected).max() < 2e-4  # an even grid: off by at most one grid point per edge


@pytest.mark.parametrize("vocabulary", [256, 700])  # whole blocks, and a last one that is not full
def test_a_pick_is_where_the_cumulative_distribution_passes_the_uniform(vocabulary):
    """Several picks a row, more rows than a chunk holds, against one plain cumulative sum in float64."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(decode.ROWS_PER_CHUNK + 9, vocabulary)) * 3).float()
    row_of = np.sort(random.integers(len(logits), size=4000))
    uniforms = random.random(4000)
    cumulative = torch.softmax(logits.double() / 0.7, -1).cumsum(-1).numpy()
    expected = [
        np.searchsorted(cumulative[r], u, side="right") for r, u in zip(row_of, uniforms, strict=True)
    ]
    found = pick_tokens(logits, 0.7, uniforms, row_of)
    assert np.mean(np.array(found) == expected) > 0.998  # float32 sums move an edge by 1e-7
    assert set(row_of.tolist()) >= {0, len(logits) - 1}


def test_uniforms_at_the_edges_pick_tokens_that_can_occur():
    logits = torch.full((2, 300), 1.0)
    assert pick_tokens(logits, 1.0, np.array([0.0, np.nextafter(1.0, 0)])) == [0, 299]
    logits[:, [0, 1, 298, 299]] = -torch.inf
    assert pick_tokens(logits, 1.0, np.array([0.0, np.nextafter(1.0, 0)])) == [2, 297]
    lonely = torch.full((2, 600), -torch.inf).index_fill_(1, torch.tensor([5]), 0.0)
    assert pick_tokens(lonely, 0.7, np.array([0.0, np.nextafter(1.0, 0)])) == [5, 5]


def test_sampling_depends_on_the_rows_own_uniforms_only():
    model = build("llama")
    uniforms = np.random.default_rng(0).random((4, 6))
    together = decode_batch(
        model, PROMPTS, Decoding(max_new_tokens=6, stop_ids=NEVER, temperature=0.7, uniforms=uniforms)
    )
    for row, prompt in enumerate(PROMPTS):
        alone = decode_batch(
            model,
            [prompt],
            Decoding(max_new_tokens=6, stop_ids=NEVER, temperature=0.7, uniforms=uniforms[row : row + 1]),
        )
        assert alone[0] == together[row]


def test_batches_hold_every_prompt_once_shortest_first():
    assert batches_by_length(PROMPTS, prompts_per_batch=3) == [[1, 3, 0], [2]]
