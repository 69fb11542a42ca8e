"""Our generator and scorer: batches change nothing, draws go with their prompts, both ways to score agree."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_tokenizer

from sftcore.config import ModelSettings
from sftcore.generate.api import Decoding, batches_by_length, complete_all
from sftcore.generate.own import OwnGenerator
from sftcore.generate.score import load_for_scoring
from sftcore.model.load import load_for_decoding
from sftcore.shares import Share

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [8]]
UNIFORMS = np.random.default_rng(3).random((10, 6))
DRAWN = Decoding(max_new_tokens=6, temperature=1.5, uniforms=UNIFORMS, completions_per_prompt=2)


@pytest.fixture(scope="module")
def generator(tiny_model_folder):
    settings = ModelSettings(path=str(tiny_model_folder), dtype="float32")
    return OwnGenerator(load_for_decoding(settings), tiny_tokenizer())


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=6), DRAWN])
def test_each_prompt_gets_its_own_replies_whatever_the_batches(generator, decoding):
    alone = [generator.complete([p], decoding.of([i]))[0] for i, p in enumerate(PROMPTS)]
    assert len({reply.text for replies in alone for reply in replies}) > 3
    assert all(len(replies) == decoding.completions_per_prompt for replies in alone)
    options = {"prompts_per_batch": 2, "label": "completing"}
    assert dict(complete_all(generator, PROMPTS, decoding, **options)) == dict(enumerate(alone))
    shares = [dict(complete_all(generator, PROMPTS, decoding, share=Share(i, 2), **options)) for i in (0, 1)]
    assert [len(found) for found in shares] == [3, 2] and shares[0] | shares[1] == dict(enumerate(alone))


def test_replies_come_batch_by_batch_with_their_counts(generator):
    coming = complete_all(generator, PROMPTS, Decoding(max_new_tokens=4), prompts_per_batch=2, label="x")
    found = list(coming)
    assert [i for i, _ in found] == [
        i for batch in batches_by_length(PROMPTS, prompts_per_batch=2) for i in batch
    ]
    assert all(reply.num_input_tokens == len(PROMPTS[i]) for i, (reply,) in found)
    assert max(reply.num_output_tokens for _, (reply,) in found) == 4


def test_both_ways_to_score_give_the_same(generator, tiny_model_folder):
    """In padded rows, next to rows of all lengths, and in packs that share what prompts begin with."""
    packed = OwnGenerator(
        load_for_scoring(ModelSettings(path=str(tiny_model_folder), dtype="float32")), generator.tokenizer
    )
    continuations = [[[3, 4], [5]], [[6]], [[7, 8, 9], [7, 8]], [[9], [2, 3]], [[6], [1]]]
    rows, packs = (each.score(PROMPTS, continuations) for each in (generator, packed))
    for row, pack in zip(rows, packs, strict=True):
        assert row == pytest.approx(pack, abs=1e-4)
    assert [len(row) for row in rows] == [2, 1, 2, 2, 2] and rows[1][0] == pytest.approx(rows[4][0], abs=1e-5)
    flat = generator.score(PROMPTS, continuations, temperature=1e6)
    assert flat[0] == pytest.approx([2 * flat[0][1], -np.log(300)], rel=1e-3)
