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
from sftcore.generate.score import Question, class_logits, load_for_scoring
from sftcore.model.classifier import restore_classifier
from sftcore.objectives import load_objective

LENGTHS, CLASSES = (6, 9, 6, 1, 13), (0, 1, 1, 0, 1)
STEP = {"normalise": "sample", "num_trained_in_step": 5, "num_samples_in_step": 5}


def documents():
    """The class is the label of the last position."""
    rng = np.random.default_rng(0)
    made = []
    for length, number in zip(LENGTHS, CLASSES, strict=True):
        labels = np.full(length, UNTRAINED, np.int32)
        labels[-1] = number
        made.append(
            SimpleNamespace(input_ids=rng.integers(1, 300, length).astype(np.int32), labels=labels, extra={})
        )
    return made


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(tmp_path)
    return tmp_path


def recipe_for(folder, **matching) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "task": "matching",
            "matching": {"mode": "discriminative"} | matching,
            "data": {"train": [{"format": "pairs", "path": "x"}]},
            "batch": {"samples_per_step": 5},
        }
    )


def with_random_output(recipe: Recipe):
    """The loss model; its output layer begins at zero, which would hide every gradient behind it."""
    model = load_objective(recipe)
    output = model.causal_lm.score
    output = output.out if recipe.matching.layers == 2 else output
    assert not output.weight.any()
    torch.nn.init.normal_(output.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def test_packed_classes_equal_documents_alone_forward_and_backward(folder):
    ours = with_random_output(recipe_for(folder))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    theirs.load_state_dict(ours.causal_lm.state_dict())
    loss, _ = ours(collate(documents(), **STEP))
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


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_classes_equal_documents_alone(folder, pooling, layers):
    """Loss and gradients of a pack are those of each document's own last or mean state."""
    recipe = recipe_for(folder, pooling=pooling, layers=layers)
    ours = with_random_output(recipe)
    theirs = with_random_output(recipe).causal_lm
    loss, _ = ours(collate(documents(), **STEP))
    loss.backward()
    losses = []
    for document, number in zip(documents(), CLASSES, strict=True):
        ids = torch.tensor(document.input_ids)[None].long()
        states = theirs.get_decoder()(input_ids=ids, document_lengths=(len(document.input_ids),))
        states = states.last_hidden_state[0]
        pooled = states.mean(0) if pooling == "mean" else states[-1]
        if layers == 2:
            pooled = torch.tanh(theirs.score.dense(pooled))
        output = theirs.score.out if layers == 2 else theirs.score
        logits = torch.nn.functional.linear(pooled, output.weight)
        losses.append(torch.nn.functional.cross_entropy(logits[None], torch.tensor([number])))
    expected = sum(losses) / len(losses)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(ours.causal_lm.named_parameters())
    assert ("score.dense.weight" in gradients) == (layers == 2)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_shared_beginnings_are_pooled_as_each_prompt_alone(folder, pooling):
    model = load_for_scoring(recipe_for(folder).model, classifies=True)
    prompts = [[5, 6, 7, *range(20, 20 + n)] for n in (1, 4, 4, 9)]
    together = class_logits(model, [Question(prompt=p) for p in prompts], pooling=pooling)
    alone = [class_logits(model, [Question(prompt=p)], pooling=pooling)[0] for p in prompts]
    assert np.allclose(together, alone, atol=1e-5)
    assert not np.allclose(together[1], together[3], atol=1e-3)
    restore_classifier(model, folder)  # a folder without a classifier of its own changes nothing
    assert class_logits(model, [Question(prompt=prompts[0])], pooling=pooling)[0] == pytest.approx(alone[0])
