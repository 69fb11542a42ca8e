"""A model's code is tried on a miniature: what packs would get wrong is refused, with the true reason."""

from __future__ import annotations

import pytest
import torch
from families import ALL, ON_GPUS, REFUSED, TRAINED, UNBUILDABLE, full_config_of, model_of
from transformers import AutoModelForCausalLM

from sftcore.errors import MissingEnvironmentError, SftError, UserInputError
from sftcore.model import ours
from sftcore.model.cost import measure_model
from sftcore.model.miniature import BEYOND, SWITCH, build, lengths_of, shrink
from sftcore.model.proof import refusing
from sftcore.model.trial import Way, try_code

FACTORS = {"short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [2.0 + i for i in range(48)]}
LONG_ROPE = FACTORS | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
LONG_ROPE |= {"factor": 32.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
LENGTH_BOUND = {  # what computes otherwise beyond a length, and gives packs what it gives their longest text
    ("phi3", 4096): {"rope_parameters": LONG_ROPE},
    ("llama", 4096): {"rope_parameters": LONG_ROPE},
    ("phimoe", 4096): {"rope_parameters": LONG_ROPE | {"short_mscale": 1.2, "long_mscale": 1.3}},
    ("llama", 2048): {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 2048,
    },
    ("phimoe", 1024): {"sliding_window": 1024},  # applied through the mask alone
    ("qwen2_moe", 512): {"use_sliding_window": True, "sliding_window": 512, "layer_types": None},
}
UNBOUND = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
    "mixtral": {"sliding_window": 4096},
    "llama": {"rope_parameters": YARN},
    "gemma4_text": {"num_kv_shared_layers": 20, "num_hidden_layers": 35, "layer_types": None},
    "gemma3n_text": {},
}
ANY = Way(longest=10**6, checkpoints=False)


def test_every_family_is_trained_or_refused_or_known_not_to_build():
    assert sorted([*TRAINED, *REFUSED, *UNBUILDABLE, *ON_GPUS]) == sorted(ALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_has_the_true_reason(name):
    with pytest.raises(SftError, match=f"can't train in packs.*{REFUSED[name]}"):
        try_code(full_config_of(name), ANY)


@pytest.mark.parametrize("name", ["bloom", "mamba", "gptj", "bart", "cohere", "axk2", "stablelm", "mpt"])
def test_reasons_are_told_apart(name):
    with pytest.raises(UserInputError, match=f"can't train in packs.*{REFUSED[name]}"):
        try_code(full_config_of(name), ANY)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINED, *ON_GPUS])
def test_what_is_trained_is_tried_and_counted(name):
    config = full_config_of(name)
    build(shrink(config), AutoModelForCausalLM)  # the trial has something to go by
    try_code(config, ANY)
    assert measure_model(shrink(config)).saved_bytes.all_layers > 0


@pytest.mark.parametrize(("name", "length"), LENGTH_BOUND)
def test_texts_on_both_sides_of_a_length_are_refused_where_packs_would_mix_them(name, length):
    config = full_config_of(name, **LENGTH_BOUND[name, length])
    assert length in lengths_of(config).values()
    try_code(config, Way(longest=length))
    with pytest.raises(UserInputError, match=f"(?s)on both sides of.*data.max_length: {length}"):
        try_code(config, Way(longest=length + 1))


@pytest.mark.parametrize("name", UNBOUND)
def test_lengths_that_packs_keep_apart_are_no_reason(name):
    config = full_config_of(name, **UNBOUND[name])
    assert lengths_of(config) and SWITCH in lengths_of(shrink(config)).values()
    try_code(config, ANY)


def test_gradients_lost_on_the_way_are_found(monkeypatch):
    """Gemma 4 E2B's later layers take keys and values of earlier ones: recomputing can lose them."""
    config = full_config_of("gemma4_text", **UNBOUND["gemma4_text"])
    way = Way(longest=64, checkpoints=True)

    def older(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()

    monkeypatch.setattr("sftcore.model.trial._TRIED", set())
    with monkeypatch.context() as patched:
        patched.setattr("sftcore.model.trial.checkpoint_activations", older)
        with pytest.raises(UserInputError, match="its gradients in packs are others"):
            try_code(config, way)
    try_code(config, way)


def test_models_that_cannot_compute_again_are_refused_by_name():
    with pytest.raises(UserInputError, match="'ctrl' can't compute activations again"):
        ours.checkpoint_activations(model_of("ctrl"))


@pytest.mark.parametrize("name", ["jetmoe", "longcat_flash"])
def test_code_that_reads_values_is_counted_on_a_miniature(name):
    """Nothing on the meta device has values."""
    cost = measure_model(full_config_of(name))
    assert cost.num_parameters > 10**9
    assert cost.saved_bytes.all_layers > cost.saved_bytes.inputs > cost.hidden_size


def test_a_trial_leaves_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    try_code(full_config_of("llama", vocab_size=700), ANY)
    assert torch.equal(torch.rand(1), expected) and BEYOND > SWITCH


def test_failures_of_a_device_or_of_memory_say_nothing_of_the_model():
    refused = pytest.raises(UserInputError, match="'llama' can't x: RuntimeError: shapes differ")
    with refused, refusing("llama", "can't x"):
        raise RuntimeError("shapes differ")
    lacking = pytest.raises(MissingEnvironmentError, match="out of memory while model type 'llama'")
    with lacking, refusing("llama", "can't x"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(torch.AcceleratorError), refusing("llama", "can't x"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
