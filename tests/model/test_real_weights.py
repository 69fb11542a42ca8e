"""Real weights: packs equal their documents alone, loss and gradients, on SmolLM2 and Gemma-3."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaged import packaged_model

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.data.tokens import load_tokenizer
from sftcore.objectives import load_objective
from sftcore.objectives.next_token import NextToken
from sftcore.precision import dtype_here, has_fast_bfloat16

TEXTS = (
    ("Where is the Eiffel Tower?", " Paris, France"),
    ("Which river flows through Vienna and Belgrade on its way to the Black Sea?", " the Danube"),
    ("法国的首都是哪里？", "巴黎"),
)
# Norm of a gradient's difference, relative to its norm. Measured on an AMX Xeon: at most 1.6e-3 (float32) and
# 1.3e-2 (bfloat16), the sums of a pack being blocked otherwise than a document's; a leak gives 0.1 and more.
GRADIENT_TOLERANCES = {"float32": 5e-3, "bfloat16": 4e-2}
LOSS_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def load(name: str, dtype: str) -> tuple[NextToken, list[SimpleNamespace]]:
    folder = packaged_model(name)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 3},
        }
    )
    tokenizer = load_tokenizer(str(folder))
    samples = []
    for question, answer in TEXTS:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, question + answer))
        ids = np.array(whole, np.int32)
        labels = np.full(len(ids), UNTRAINED, np.int32)
        labels[len(prompt) - 1 : -1] = ids[len(prompt) :]
        samples.append(SimpleNamespace(input_ids=ids, labels=labels, extra={}))
    return load_objective(recipe), samples


def gradients(model: NextToken, batches: list) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = model(batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.float().clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("smollm2-135m", "float32"), ("smollm2-135m", "bfloat16"), ("gemma3-270m", dtype_here())],
    ids=["smollm2-float32", "smollm2-bfloat16", "gemma3-auto"],
)
def test_a_pack_of_real_text_equals_its_documents_alone(name, dtype):
    """In bfloat16 where CPUs have it; elsewhere miniatures are proven in it (tests/model/test_packs.py)."""
    if dtype == "bfloat16" and not has_fast_bfloat16():
        pytest.skip("this CPU emulates bfloat16, several times slower than float32")
    model, samples = load(name, dtype)
    trained = sum(int((s.labels != UNTRAINED).sum()) for s in samples)
    step = {"normalise": "token", "num_trained_in_step": trained, "num_samples_in_step": 3}
    packed = gradients(model, [collate(samples, **step)])
    alone = gradients(model, [collate([s], **step) for s in samples])
    assert trained >= 6 and 0 < alone[0] < 20
    assert packed[0] == pytest.approx(alone[0], rel=LOSS_TOLERANCES[dtype])
    for key, gradient in alone[1].items():
        difference = (packed[1][key] - gradient).norm() / gradient.norm()
        assert difference <= GRADIENT_TOLERANCES[dtype], f"{key}: {difference:.2g}"
