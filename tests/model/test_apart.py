"""Under autocast a model multiplies in float32 what it does so held in bfloat16, and nothing else."""

from __future__ import annotations

import pytest
import torch
from families import model_of

from sftcore.model.apart import Products, compute_apart, hold_in_bfloat16

ROUTED = ("axk1", "deepseek_v2", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "hy_v3", "kolibri1")
ROUTED += ("longcat_flash", "solar_open", "beam", "ernie4_5_moe")
PLAIN = ("llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe")
IDS = torch.arange(5, 69)[None]


def products(model, *, autocast: bool) -> dict[str, set[torch.dtype]]:
    """Dtypes of results by the class of the module, of modules that hold parameters."""
    watch = Products.of(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), watch:
        model(input_ids=IDS, use_cache=False)
    found: dict[str, set[torch.dtype]] = {}
    for module, _, result in watch.made:
        if any(True for _ in module.parameters()):
            found.setdefault(type(module).__qualname__, set()).add(result)
    return found


@pytest.mark.parametrize("name", ROUTED + PLAIN)
def test_products_have_the_dtype_that_they_have_in_a_bfloat16_model(name):
    wanted = products(hold_in_bfloat16(model_of(name)), autocast=False)
    has_float32 = any(torch.float32 in dtypes for dtypes in wanted.values())
    assert has_float32 == (name in ROUTED)
    model = model_of(name)
    compute_apart(model)
    found = products(model, autocast=True)
    for kind, dtypes in wanted.items():
        if len(dtypes) == 1:
            assert found[kind] == dtypes, kind
