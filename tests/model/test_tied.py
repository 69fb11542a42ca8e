"""The one gradient of a tied embedding is the sum that autograd makes of two."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from sftcore.batching.collate import collate
from sftcore.model.attention import choose_attention
from sftcore.model.ours import install_head
from sftcore.model.tied import add_rows_, share_gradient
from sftcore.objectives.next_token import NextToken

PAD = 0  # of tiny models; embeddings give its row no gradient


def model_of(kind: str, dtype: torch.dtype) -> NextToken:
    torch.manual_seed(0)
    config = tiny_config(kind)
    attention = choose_attention(config, "auto", dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    install_head(model, z_loss=0.1, label_smoothing=0.1, kind="chunked")
    return NextToken(model)


def batch_of(ids: list[int]):
    ids_T = np.array(ids, np.int32)
    sample = SimpleNamespace(input_ids=ids_T, labels=np.roll(ids_T, -1), extra={})
    return collate(
        [sample, sample], normalise="token", num_trained_in_step=2 * len(ids), num_samples_in_step=2
    )


def gradients(model: NextToken, *batches) -> dict[str, torch.Tensor]:
    for batch in batches:
        model(batch)[0].backward()
    return {name: p.grad.float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_one_gradient_equals_the_sum_of_two(kind, dtype, tolerance):
    by_autograd, shared = model_of(kind, dtype), model_of(kind, dtype)
    assert share_gradient(shared.causal_lm)
    batches = [batch_of([5, 7, 7, PAD, 7, 11]), batch_of([9, 5, 7])]
    expected, got = gradients(by_autograd, *batches), gradients(shared, *batches)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_sum_takes_both(kind):
    by_autograd, shared = model_of(kind, torch.float32), model_of(kind, torch.float32)
    assert share_gradient(shared.causal_lm)
    weight = shared.causal_lm.get_output_embeddings().weight
    total = shared.causal_lm.get_output_embeddings().gradient_sum = torch.zeros(weight.shape)
    batch = batch_of([5, 7, 7, 11])
    shared(batch)[0].backward()
    assert weight.grad is None
    expected = gradients(by_autograd, batch)["causal_lm.model.embed_tokens.weight"]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-7)


def test_the_padding_row_is_trained_by_the_head_alone():
    head_only, with_pads = model_of("llama", torch.float32), model_of("llama", torch.float32)
    assert share_gradient(with_pads.causal_lm)
    embedding = with_pads.causal_lm.get_input_embeddings()
    assert embedding.padding_idx == PAD
    batch = batch_of([5, PAD, PAD, 6])
    expected, got = gradients(head_only, batch), gradients(with_pads, batch)
    name = "causal_lm.model.embed_tokens.weight"
    torch.testing.assert_close(got[name][PAD], expected[name][PAD])


def test_losses_without_gradients_and_models_that_are_only_evaluated_stay_as_they_are():
    model = model_of("gemma3", torch.float32)
    batch = batch_of([5, 7, 8])
    with torch.no_grad():
        before = model(batch)
        assert share_gradient(model.causal_lm)
        assert model(batch) == before
    assert model.causal_lm.get_output_embeddings().weight_behind_lookup is None
    model.causal_lm.requires_grad_(False)
    assert model(batch) == before


def test_a_lookup_without_the_head_still_has_its_gradient():
    model = model_of("llama", torch.float32).causal_lm
    assert share_gradient(model)
    embedding = model.get_input_embeddings()
    embedding(torch.tensor([3, 3, 4])).sum().backward()
    rows = embedding.weight.grad[:, 0]
    assert {i: float(rows[i]) for i in range(len(rows)) if rows[i]} == {3: 2.0, 4: 1.0}


@pytest.mark.parametrize("change", ["untied", "sparse", "edited"])
def test_other_embeddings_are_left_to_autograd(change):
    model = model_of("llama", torch.float32).causal_lm
    embedding = model.get_input_embeddings()
    if change == "untied":
        embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())
    elif change == "sparse":
        embedding.sparse = True
    else:
        embedding.register_forward_hook(lambda module, arguments, rows: rows + 1)
    assert not share_gradient(model)


def test_a_copied_model_has_its_own_gradient():
    """Hooks that hold the first model's head must not be what its copy trains."""
    model = model_of("llama", torch.float32)
    assert share_gradient(model.causal_lm)
    other = copy.deepcopy(model)
    expected, got = gradients(model, batch_of([5, 6])), gradients(other, batch_of([5, 6]))
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


def test_many_small_rows_of_one_token_are_not_rounded_away():
    total = torch.full((4, 2), 1.0, dtype=torch.bfloat16)
    add_rows_(total, torch.full((512,), 2), torch.full((512, 2), 2**-9, dtype=torch.bfloat16))
    assert total.tolist() == [[1, 1], [1, 1], [2, 2], [1, 1]]
