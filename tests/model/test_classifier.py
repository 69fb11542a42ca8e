"""Classification in packs equals transformers' own classifier on each document alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.model.load import load_classifier_for_training

LENGTHS, CLASSES = (6, 9, 6, 1, 13), (0, 1, 1, 0, 1)
STEP = {"normalise": "sample", "num_trained_in_step": 5, "num_samples_in_step": 5}


def documents():
    """The class is the label of the last position."""
    rng = np.random.default_rng(0)
    made = []
    for length, number in zip(LENGTHS, CLASSES, strict=True):
        labels = np.full(length, UNTRAINED, np.int32)
        labels[-1] = number
        made.append(SimpleNamespace(input_ids=rng.integers(1, 300, length).astype(np.int32), labels=labels))
    return made


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(tmp_path)
    return tmp_path


def test_packed_classes_equal_documents_alone_forward_and_backward(folder):
    torch.manual_seed(1)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 5},
        }
    )
    ours = load_classifier_for_training(recipe, num_labels=2)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    theirs.load_state_dict(ours.causal_lm.state_dict())
    loss = ours(collate(documents(), **STEP))
    loss.backward()
    expected = sum(
        torch.nn.functional.cross_entropy(
            theirs(input_ids=torch.tensor(d.input_ids)[None].long()).logits, torch.tensor([c])
        )
        for d, c in zip(documents(), CLASSES, strict=True)
    ) / len(CLASSES)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(ours.causal_lm.named_parameters())
    assert gradients["score.weight"].shape == (2, 32)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_one_position_per_document_is_classified(folder):
    batch = collate(documents(), **STEP)
    assert batch.trained_index.tolist() == [5, 14, 20, 21, 34]
    assert batch.targets.tolist() == list(CLASSES)
    assert batch.weights.tolist() == pytest.approx([0.2] * 5)
