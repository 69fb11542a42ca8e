"""Fixtures that many tests share: a tiny model folder, a recipe with its data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny import SUBJECTS, TOWNS, tiny_config, tiny_tokenizer, write_lines

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long an example takes says nothing about a property


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tiny Llama and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tiny_model_folder, tmp_path, monkeypatch) -> dict:
    """A recipe as a dictionary, with its data written to `tmp_path`, which becomes the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": f"f{i}", "relation": "P19", "subject": f"{name}{i}", "answers": [TOWNS[i % 4]]}
        for i, name in enumerate(SUBJECTS * 2)
    ]
    write_lines(tmp_path / "train.jsonl", rows[:16])
    write_lines(tmp_path / "test.jsonl", rows[16:])
    return {
        "name": "tiny",
        "seed": 3,
        "model": {"path": str(tiny_model_folder), "dtype": "float32"},
        "data": {
            "train": [{"format": "facts", "path": "train.jsonl"}],
            "test": [{"format": "facts", "path": "test.jsonl"}],
        },
        "probe": {"templates": 2, "samples": 3, "max_new_tokens": 4},
        "batch": {"samples_per_step": 4, "capacity": 256},
        "train": {"epochs": 2, "lr": 1e-2},
        "checkpoint": {"save_every_steps": 3},
        "evaluate": {"max_new_tokens": 4},
        "tracking": {"tensorboard": False},
    }


@pytest.fixture(autouse=True)
def _no_rank_left(monkeypatch) -> None:
    """A run in this process takes a port and says so in the environment: commands started later must not."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(items) -> None:
    """Skip what this machine can't run, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
