"""FLOPs of attention are those of the pairs that a model's layers really compare."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_config
from transformers import DeepseekV2Config, MistralConfig

from sftcore.model.cost import measure_model

LENGTHS = np.array([3, 7, 40])


def pairs(length: int, window: int) -> float:
    """Counted one by one; the diagonal counts half, as in the formula's len^2 / 2."""
    return sum(min(position, window) + 0.5 for position in range(length)) - 0.5 * max(0, length - window)


def attention_flops(config) -> float:
    cost = measure_model(config).coefficients
    return cost.of(LENGTHS, np.zeros(3)).sum() - cost.per_token * LENGTHS.sum()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_attention_counts_the_pairs_of_each_layer(kind):
    config = tiny_config(kind)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if k == "sliding_attention" else 10**6 for k in kinds]
    assert kind == "llama" or set(kinds) == {"sliding_attention", "full_attention"}
    width = config.num_attention_heads * config.head_dim
    expected = 12 * width * sum(pairs(int(n), window) for n in LENGTHS for window in windows)
    assert attention_flops(config) == pytest.approx(expected)


def test_a_window_without_layer_types_holds_for_all_layers():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes |= {"num_hidden_layers": 3, "vocab_size": 32, "intermediate_size": 16}
    banded = MistralConfig(**sizes, sliding_window=4)
    expected = 12 * 16 * 3 * sum(pairs(int(n), 4) for n in LENGTHS)
    assert attention_flops(banded) == pytest.approx(expected)
    assert attention_flops(MistralConfig(**sizes, sliding_window=None)) > 2 * expected


def test_values_of_another_size_than_keys_count_as_they_are():
    """Keys of 8 + 4, values of 6: (12 + 6) / 2 a head; the output layer of attention takes 4 * 6."""
    config = DeepseekV2Config(**MLA)
    assert measure_model(config).attention_width == 4 * 9
    assert attention_flops(config) == pytest.approx(6 * 2 * 4 * 9 * sum(n**2 for n in LENGTHS.tolist()))


MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
MLA |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
MLA |= {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1}
MLA |= {"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
