"""A model's fingerprint changes with every file that decides its numbers, and with no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftcore.model.identity import fingerprint_model

DECIDING = (
    *(
        "config.json",
        "generation_config.json",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.pt", "consolidated.00.pth"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "modeling_own.py"),
)
BESIDE = (
    "README.md",
    "LICENSE",
    "origin.json",
    "matching.json",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
)
LEFT = ("scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "trainer_state.json")


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in (*DECIDING, *BESIDE, *LEFT):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("one")
    return tmp_path / "model"


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_numbers_is_in_it(folder, name):
    before = fingerprint_model(str(folder))
    (folder / name).write_text("two")
    changed = fingerprint_model(str(folder))
    (folder / name).unlink()
    assert len({before, changed, fingerprint_model(str(folder))}) == 3


@pytest.mark.parametrize("name", (*BESIDE, *LEFT))
def test_notes_and_what_training_left_are_not(folder, name):
    before = fingerprint_model(str(folder))
    (folder / name).unlink()
    assert fingerprint_model(str(folder)) == before


def test_an_adapter_is_one_together_with_its_base(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").write_text("low rank")
    before = fingerprint_model(str(adapter))
    (folder / "README.md").write_text("two")
    assert fingerprint_model(str(adapter)) == before != fingerprint_model(str(folder))
    (folder / "pytorch_model.bin").write_text("two")
    assert fingerprint_model(str(adapter)) != before


def test_a_copy_is_the_same_model_and_a_hub_name_stands_for_itself(folder, tmp_path):
    copy = tmp_path / "copy"
    folder.rename(copy)
    first = fingerprint_model(str(copy))
    copy.rename(folder)
    assert fingerprint_model(str(folder)) == first and fingerprint_model("org/model") == "org/model"
