"""Rows that share their prompt's keys and values have the logits of their whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config
from transformers import AutoModelForCausalLM, Gemma2Config

from sftcore.generate.prefix_cache import (
    CachedRows,
    SharedPrefixRows,
    _own_attention,
    arrange,
    proves_equal,
    shared_prefix,
)

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [8], [9, 10, 11]]


def build(kind: str):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager").eval()


def follow(rows, model, steps) -> None:
    """Advance along `steps`, comparing each row's logits with those of its whole text read at once."""
    texts = [list(prompt) for prompt in PROMPTS]
    for number in range(len(steps) + 1):
        for row, text in enumerate(texts):
            expected = model(input_ids=torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(rows.logits[row], expected, rtol=1e-4, atol=1e-5)  # float32
        if number < len(steps):
            sources, tokens = steps[number]
            texts = [[*texts[source], token] for source, token in zip(sources, tokens, strict=True)]
            yield sources, tokens


STEPS = [  # rows part, move into the place of an ended one, and all rows of a prompt end
    ([0, 1, 2, 0, 0], [20, 21, 22, 23, 24]),
    ([0, 1, 2, 3, 4, 1], [30, 31, 32, 33, 34, 35]),
    ([0, 1, 5, 4], [40, 41, 42, 43]),  # prompt 2 has no row any more
    ([0, 3, 2], [50, 51, 52]),
    ([0, 1], [60, 61]),  # prompt 1 neither: prompts are dropped
    ([0, 1, 0], [70, 71, 72]),
]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])  # gemma3: a window of 4 tokens
@torch.inference_mode()
def test_logits_are_those_of_the_whole_text(kind):
    model, reference = build(kind), build(kind)
    with _own_attention(model):
        rows = SharedPrefixRows(model, PROMPTS, max_rows=6, max_new_tokens=len(STEPS) + 1)
        for sources, tokens in follow(rows, reference, STEPS):
            rows.advance(sources, tokens)
    assert len(rows.cache.lengths_P) == 1, "prompts without rows were dropped"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.inference_mode()
def test_rows_with_transformers_cache_do_the_same(kind):
    model = build(kind)
    rows = CachedRows(model, PROMPTS)
    for sources, tokens in follow(rows, build(kind), STEPS):
        rows.advance(sources, tokens)
    assert rows.mask.shape == (3, max(map(len, PROMPTS)) + len(STEPS))


@given(st.data())
def test_arranged_rows_never_overwrite_a_source(data):
    old = data.draw(st.integers(1, 12))
    sources = data.draw(st.lists(st.integers(0, old - 1), min_size=1, max_size=20))
    order = arrange(sources)
    assert sorted(order) == list(range(len(sources)))
    new = [sources[i] for i in order]
    overwritten = {row for row, source in enumerate(new) if row != source}
    assert not overwritten & set(new)
    stay = sum(row == source for row, source in enumerate(new))
    assert stay == len({source for source in sources if source < len(sources)}), "all that can stay do"


def test_a_model_with_soft_caps_falls_back(caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**sizes, vocab_size=300, num_key_value_heads=2, head_dim=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert not proves_equal(model) and model.config._attn_implementation == "eager"
    with shared_prefix(model) as is_shared:
        assert not is_shared


def test_a_model_that_would_differ_is_found_out(monkeypatch):
    import sftcore.generate.prefix_cache as module

    assert proves_equal(build("llama"))
    right = module._by_row
    monkeypatch.setattr(module, "_by_row", lambda t, cache: right(t, cache).flip(0))
    assert not proves_equal(build("llama"))


def test_places_count_rows_of_each_prompt():
    from sftcore.generate.prefix_cache import _places

    per_prompt, places = _places(np.array([2, 0, 2, 2]), 3)
    assert per_prompt == 3 and places.tolist() == [6, 0, 7, 8]
