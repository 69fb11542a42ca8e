"""Models with experts train with the default adapters: two ranks as one process, held in 16 and in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import save_family
from launching import run_cells, steps, write_recipe
from tiny import tiny_tokenizer

KINDS = ("lora", "qlora")
CELLS = [("lora", "zero1"), ("lora", "zero3"), ("qlora", "zero2")]
CHANGES = {"train": {"epochs": 1, "lr": 1e-3}, "checkpoint": {"save_every_steps": 100}}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_default_adapters_train_on_two_ranks_as_on_one(tiny_recipe, family):
    folder = Path("experts").absolute()
    save_family(family, folder)
    tiny_tokenizer().save_pretrained(folder)
    tiny_recipe["model"] = {"path": str(folder), "dtype": "bfloat16"}

    def written(ranks: str, kind: str, stage: str) -> Path:
        name = f"{ranks}-{kind}-{stage}"
        return write_recipe(tiny_recipe, name, adapter={"kind": kind}, deepspeed=stage, **CHANGES)

    run_cells([written("one", kind, "zero1") for kind in KINDS], ranks=1)
    run_cells([written("two", *cell) for cell in CELLS], ranks=2)
    for kind, stage in CELLS:
        alone, together = steps(f"one-{kind}-zero1"), steps(f"two-{kind}-{stage}")
        assert len(alone) == len(together) > 2
        for a, b in zip(alone, together, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
