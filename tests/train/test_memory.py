"""Out of memory: the message, and the predictions that it and the plan rest on."""

from __future__ import annotations

import re
import subprocess

import pytest
from launching import ENVIRONMENT, ROOT, write_recipe
from tiny import tiny_config

from sftcore.config import AdapterSettings
from sftcore.model.cost import measure_model
from sftcore.recipe import load_recipe
from sftcore.train.memory import is_out_of_memory, predict_bytes, rank_remedies

LIMITED = """
import resource, sys
from pathlib import Path
from launcher import worker
from sftcore.train import loop
earlier = loop.Engine.rehearse
def limited(self, batch):
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, resource.RLIM_INFINITY))
    earlier(self, batch)
loop.Engine.rehearse = limited
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_exhausts_its_memory_says_what_it_held_and_what_would_help(tiny_recipe):
    """The address space is limited just before the first pack, whose activations then don't fit."""
    path = write_recipe(tiny_recipe, "small", batch={"samples_per_step": 16, "capacity": 4096})
    script = path.with_name("limited.py")
    script.write_text(LIMITED)
    import sys

    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert re.search(
        r"error: out of memory in step 1: .*\n +got: a pack of [\d,]+ tokens, [\d,]+ of them "
        r"trained, in 16 documents; peak [\d.]+ GB",
        done.stderr,
    ), done.stderr[-2000:]
    assert done.stderr.count("saves about") == 3


def test_only_failures_to_get_memory_count_as_such():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_saved_activations_are_those_that_autograd_keeps(tiny_recipe):
    """Layer inputs by hand; more targets of an adapter keep more; recomputation keeps less."""
    full = measure_model(tiny_config("llama"))
    adapter = measure_model(tiny_config("llama"), AdapterSettings(kind="lora", r=4))
    assert full.saved_bytes.inputs == 2 * 32 * 2, "two layers, 32 wide, bfloat16"
    assert full.saved_bytes.all_layers / 2 <= full.saved_bytes.dearest_layer < full.saved_bytes.all_layers
    assert full.activation_bytes(100, is_recomputed=True) < full.activation_bytes(100, is_recomputed=False)
    assert adapter.num_trained_parameters < full.num_trained_parameters


def test_remedies_are_ranked_by_what_they_save(tiny_recipe):
    recipe = load_recipe(write_recipe(tiny_recipe, "r", batch={"capacity": 4096}))
    remedies = rank_remedies(recipe, world=2, num_tokens=4096, longest=100)
    sizes = [size for _, size in remedies]
    assert len(remedies) == 3 and sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert remedies[0][0] in ("batch.capacity: 2048", "train.activation_checkpointing: full")
    before = sum(predict_bytes(recipe, world=2, num_tokens=4096).values())
    name, size = next(r for r in remedies if r[0].startswith("batch"))
    assert before - size == pytest.approx(sum(predict_bytes(recipe, world=2, num_tokens=2048).values()))
