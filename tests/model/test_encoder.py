"""Encoders in the trainer: a pack's loss and gradient equal transformers on each pair alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_bert import bert_tokenizer, write_bert
from transformers import AutoModelForSequenceClassification, BertConfig

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.config import Recipe
from sftcore.data.contents import Pair
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.errors import UserInputError
from sftcore.model.encoder import encoder_logits, is_encoder, load_encoder_for_training
from sftcore.objectives import load_objective

PAIRS = [("a b c", "c b", 0), ("d", "d", 1), ("a b c d e f", "f e d", 1), ("g h", "a a a a a", 0)]


@pytest.fixture
def folder(tmp_path):
    write_bert(tmp_path)
    return tmp_path


def recipe_for(folder, **changes) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "task": "matching",
            "matching": {"mode": "encoder"},
            "data": {"train": [{"format": "pairs", "path": "x"}], "max_length": 32},
            "batch": {"samples_per_step": 4},
        }
        | changes
    )


def records() -> list[Record]:
    return [
        Record(id=str(i), split="train", file="f", row=i, content=Pair(a=a, b=b, label=label))
        for i, (a, b, label) in enumerate(PAIRS)
    ]


def test_samples_are_what_the_tokenizer_joins(folder):
    tokenizer = bert_tokenizer()
    prompter = Prompter(PromptOptions.of(recipe_for(folder)), tokenizer)
    samples = prompter.sample_batch(records())
    for sample, (a, b, label) in zip(samples, PAIRS, strict=True):
        assert sample.input_ids.tolist() == tokenizer(a, b)["input_ids"]
        assert sample.labels.tolist() == [UNTRAINED] * (len(sample.input_ids) - 1) + [label]
    assert prompter.prompt_ids_batch(records()) == [sample.input_ids.tolist() for sample in samples]


def test_a_pack_equals_its_pairs_alone_forward_and_backward(folder):
    recipe = recipe_for(folder)
    ours = load_objective(recipe).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    theirs.load_state_dict(ours.causal_lm.state_dict())
    theirs.eval()
    tokenizer = bert_tokenizer()
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)
    samples = [
        SimpleNamespace(input_ids=s.input_ids, labels=s.labels, extra={})
        for s in prompter.sample_batch(records())
    ]
    batch = collate(samples, normalise="sample", num_trained_in_step=4, num_samples_in_step=4)
    assert len(set(batch.document_lengths)) == 4, "rows are padded"
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    loss, _ = ours(batch)
    loss.backward()
    alone = [theirs(**tokenizer(a, b, return_tensors="pt")).logits for a, b, _ in PAIRS]
    expected = sum(
        torch.nn.functional.cross_entropy(logits, torch.tensor([label])) / 4
        for logits, (_, _, label) in zip(alone, PAIRS, strict=True)
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(ours.causal_lm.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)
    theirs.save_pretrained(folder)
    found = encoder_logits(recipe, str(folder), prompter.prompt_ids_batch(records()))
    assert np.array(found) == pytest.approx(torch.cat(alone).detach().numpy(), abs=1e-5)


def test_what_can_not_be_trained_so_is_refused(folder, tiny_model_folder):
    with pytest.raises(UserInputError, match="'llama' is no encoder\n.*\n.*mode: discriminative"):
        load_encoder_for_training(recipe_for(tiny_model_folder))
    with pytest.raises(UserInputError, match="got: 33\n.*at most 32"):
        data = {"train": [{"format": "pairs", "path": "x"}], "max_length": 33}
        load_encoder_for_training(recipe_for(folder, data=data))
    assert is_encoder(BertConfig()) and not is_encoder(BertConfig(is_decoder=True))
