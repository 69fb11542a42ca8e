"""Packed documents equal each document alone: loss, every gradient, every state; and can't see each other."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from sftcore.batching.collate import UNTRAINED, collate
from sftcore.errors import UserInputError
from sftcore.model.attention import choose_attention
from sftcore.model.attention.sdpa_docs import group_documents
from sftcore.model.forward import decode_states
from sftcore.model.gates import slim_gates
from sftcore.model.norms import slim_norms
from sftcore.model.ours import install_head
from sftcore.model.proof import prove_head_and_packs
from sftcore.model.tied import share_gradient
from sftcore.objectives.next_token import NextToken

LENGTHS = (6, 9, 6, 1, 13)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2}  # on values of order 1


def build(kind: str, dtype: torch.dtype) -> NextToken:
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=choose_attention(config, "auto", dtype="float32", device="cpu")
    )
    model = model.to(dtype)
    slim_norms(model)
    assert slim_gates(model) == model.config.num_hidden_layers
    install_head(model, z_loss=0.0, label_smoothing=0.0, kind="chunked")
    prove_head_and_packs(model)
    assert share_gradient(model) == model.config.tie_word_embeddings
    return NextToken(model)


def samples() -> list[SimpleNamespace]:
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        ids = rng.integers(1, 300, length).astype(np.int32)
        labels = np.full(length, UNTRAINED, np.int32)
        labels[length // 2 : -1] = ids[length // 2 + 1 :]
        made.append(SimpleNamespace(input_ids=ids, labels=labels, extra={}))
    return made


def loss_and_gradients(model: NextToken, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = model(batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.float().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("normalise", ["token", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_pack_equals_its_documents_alone(kind, dtype, normalise):
    model, documents = build(kind, dtype), samples()
    trained = sum(int((d.labels != UNTRAINED).sum()) for d in documents)
    step = {"normalise": normalise, "num_trained_in_step": trained, "num_samples_in_step": len(documents)}
    documents = [d for d in documents if (d.labels != UNTRAINED).any()]
    packed = loss_and_gradients(model, [collate(documents, **step)])
    alone = loss_and_gradients(model, [collate([d], **step) for d in documents])
    tolerance = TOLERANCES[dtype]
    assert packed[0] == pytest.approx(alone[0], rel=tolerance)
    assert all(g.abs().sum() > 0 for g in alone[1].values())
    for name, gradient in alone[1].items():
        scale = gradient.abs().max()
        assert (packed[1][name] - gradient).abs().max() <= 5 * tolerance * scale, name


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_perturbing_a_document_changes_no_bit_of_another(kind):
    model, documents = build(kind, torch.float32), samples()
    step = {"normalise": "token", "num_trained_in_step": 1, "num_samples_in_step": 1}
    with torch.no_grad():
        before = decode_states(model.causal_lm, collate(documents, **step))[0]
        documents[1].input_ids = documents[1].input_ids[::-1].copy()
        after = decode_states(model.causal_lm, collate(documents, **step))[0]
    start, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    assert not torch.equal(before[start:end], after[start:end])
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])


def test_sliding_windows_equal_the_models_own_attention():
    config = tiny_config("gemma3")
    model = build("gemma3", torch.float32).causal_lm
    own = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    own.load_state_dict(model.state_dict())
    ids = torch.arange(1, 14)[None]
    assert ids.shape[1] > config.sliding_window
    with torch.no_grad():
        ours = model(input_ids=ids, document_lengths=(13,)).logits
        torch.testing.assert_close(ours, own(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_equal_documents_share_a_call_and_sorted_packs_are_not_moved():
    plan = group_documents((9, 6, 6, 1), torch.device("cpu"))
    assert plan.groups == ((9, 1), (6, 2), (1, 1)) and plan.order is None
    moved = group_documents((1, 2, 1), torch.device("cpu"))
    assert moved.groups == ((2, 1), (1, 2))
    assert moved.order.tolist() == [1, 2, 0, 3]
    assert moved.order[moved.inverse].tolist() == [0, 1, 2, 3]


def test_an_idle_batch_has_no_loss_and_no_gradient():
    model = build("llama", torch.float32)
    step = {"normalise": "token", "num_trained_in_step": 9, "num_samples_in_step": 5}
    loss, gradients = loss_and_gradients(model, [collate(samples(), idle=True, **step)])
    assert loss == 0 and all(g.abs().sum() == 0 for g in gradients.values())


def test_a_model_whose_logits_are_edited_is_refused():
    config = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=choose_attention(config, "auto", dtype="float32", device="cpu")
    )
    output = model.get_output_embeddings()
    forward = model.forward

    def scaled(**kwargs):
        result = forward(**kwargs)
        result.logits = result.logits * 3
        return result

    model.forward = scaled
    install_head(model, z_loss=0.0, label_smoothing=0.0, kind="chunked")
    with pytest.raises(UserInputError, match="changes its logits after the output layer"):
        prove_head_and_packs(model)
    assert output is not None


def test_a_model_that_mixes_documents_is_refused():
    model = build("llama", torch.float32).causal_lm
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UserInputError, match="its layers mix documents"):
        prove_head_and_packs(model)


def test_needs_that_the_backend_lacks_are_refused_by_name():
    config = tiny_config("llama")
    config.attn_logit_softcapping = 50.0
    with pytest.raises(UserInputError, match="soft cap"):
        choose_attention(config, "auto", dtype="float32", device="cpu")
