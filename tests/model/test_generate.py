"""Batched decoding equals transformers' generate; sampling follows the softmax; stopping is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from sftcore.model.generate import Sampling, batches_by_length, decode_batch, pick_tokens

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
NEVER = frozenset([299])


def build(kind: str):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_greedy_equals_generate_prompt_by_prompt(kind):
    model = build(kind)
    found = decode_batch(model, PROMPTS, max_new_tokens=8, stop_ids=NEVER)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=299
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_a_row_is_the_same_whatever_the_other_rows_do():
    model = build("llama")
    free = decode_batch(model, PROMPTS, max_new_tokens=8, stop_ids=NEVER, completions_per_prompt=2)
    assert [free[2 * i] for i in range(4)] == [free[2 * i + 1] for i in range(4)]

    def cut(row: int, tokens: list[int]) -> bool:
        return row % 3 == 0 and len(tokens) == 1 + row % 2

    cut_short = decode_batch(
        model, PROMPTS, max_new_tokens=8, stop_ids=NEVER, completions_per_prompt=2, is_done=cut
    )
    for row, (some, whole) in enumerate(zip(cut_short, free, strict=True)):
        assert some == (whole[: 1 + row % 2] if row % 3 == 0 else whole)


def test_a_completion_ends_before_its_stop_token():
    model = build("llama")
    whole = decode_batch(model, PROMPTS, max_new_tokens=8, stop_ids=NEVER)
    stop = whole[0][3]
    stopped = decode_batch(model, PROMPTS, max_new_tokens=8, stop_ids=frozenset([stop]))
    assert stopped[0] == whole[0][: whole[0].index(stop)]
    assert all(stop not in tokens for tokens in stopped)


def test_uniforms_pick_tokens_in_proportion_to_the_tempered_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -5.0]]).repeat(20_000, 1)
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    counts = np.bincount(pick_tokens(logits, 0.7, uniforms), minlength=4) / 20_000
    expected = torch.softmax(logits[0] / 0.7, -1).numpy()
    assert np.abs(counts - expected).max() < 2e-4  # an even grid: off by at most one grid point per edge


def test_uniforms_at_the_edges_stay_in_the_vocabulary():
    logits = torch.full((2, 5), 1.0)
    assert pick_tokens(logits, 1.0, np.array([0.0, np.nextafter(1.0, 0)])) == [0, 4]


def test_sampling_depends_on_the_rows_own_uniforms_only():
    model = build("llama")
    uniforms = np.random.default_rng(0).random((4, 6))
    together = decode_batch(
        model,
        PROMPTS,
        max_new_tokens=6,
        stop_ids=NEVER,
        sampling=Sampling(temperature=0.7, uniforms=uniforms),
    )
    for row, prompt in enumerate(PROMPTS):
        alone = decode_batch(
            model,
            [prompt],
            max_new_tokens=6,
            stop_ids=NEVER,
            sampling=Sampling(temperature=0.7, uniforms=uniforms[row : row + 1]),
        )
        assert alone[0] == together[row]


def test_batches_hold_every_prompt_once_shortest_first():
    assert batches_by_length(PROMPTS, prompts_per_batch=3) == [[1, 3, 0], [2]]
