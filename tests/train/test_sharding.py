"""Under ZeRO-3 no rank holds a whole copy of the model: not after loading, not while exporting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import launcher, run, write_recipe
from safetensors import safe_open
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sftcore.model.weights import shards_of, write_shards

SCRIPT = """
import json, sys, threading
from pathlib import Path
import torch
from sftcore.stages import train as training
from sftcore import dist
from sftcore.recipe import load_recipe
from sftcore.train import engine, export
torch.set_num_threads(1)
size, path, tiny = [a for a in sys.argv[1:] if not a.startswith('--')]
export.SHARD_BYTES = int(size) // 8
def anonymous_bytes():
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('RssAnon:'))
def growth(function, *args, **options):
    peaks, done = [anonymous_bytes()], threading.Event()
    def sample():
        while not done.wait(0.002):
            peaks.append(anonymous_bytes())
    thread = threading.Thread(target=sample)
    thread.start()
    result = function(*args, **options)
    done.set()
    thread.join()
    return max(peaks) - peaks[0], result
seen = {}
load, write = training.load_objective, training.export_weights
def watched_load(*args, **options):
    load(load_recipe(Path(tiny)), **options)  # imports
    before = anonymous_bytes()
    seen['load_peak'], model = growth(load, *args, **options)
    engine.keep_freed_memory()  # as the engine begins
    seen['load'] = anonymous_bytes() - before
    return model
def watched_write(*args, **options):
    seen['export'], _ = growth(write, *args, **options)
training.load_objective, training.export_weights = watched_load, watched_write
training.train_recipe(load_recipe(Path(path)))
Path(f'seen-{dist.rank()}.json').write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_no_rank_holds_a_whole_copy_of_the_model(tiny_recipe, tmp_path):
    """85M float32 parameters, a half of them on each of two ranks; exported in shards of an eighth.

    While it loads, freed blocks come on top: the peak is about a copy of so small a model.
    """
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 768, 3072, 64
    config.num_attention_heads = config.num_key_value_heads = 12
    config.num_hidden_layers = 9
    folder = tmp_path / "large"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model_bytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder, max_shard_size="100MB")
    tiny_tokenizer().save_pretrained(folder)
    Path("run_watched.py").write_text(SCRIPT)
    path = write_recipe(
        tiny_recipe,
        "large",
        model={"path": str(folder)},
        deepspeed="zero3",
        train={"epochs": 1},
        checkpoint={"save_every_steps": 100},
        batch={"samples_per_step": 16},
    )
    tiny = write_recipe(tiny_recipe, "tiny")
    done = run(*launcher(2), "run_watched.py", str(model_bytes), str(path), str(tiny))
    assert done.returncode == 0, (done.stdout + done.stderr)[:9000]
    for rank in (0, 1):
        seen = json.loads(Path(f"seen-{rank}.json").read_text())
        assert 0.4 * model_bytes < seen["load"] < 0.7 * model_bytes, (rank, seen, model_bytes)
        assert seen["export"] < 0.4 * model_bytes, (rank, seen, model_bytes)
    files = sorted(Path("runs/large/model").glob("*.safetensors"))
    assert len(files) > 4
    loaded = AutoModelForCausalLM.from_pretrained("runs/large/model", dtype=torch.float32)
    assert sum(p.nbytes for p in loaded.parameters()) == model_bytes
    assert not torch.equal(
        loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )


def test_shards_are_named_as_transformers_reads_them(tmp_path):
    weights = [(f"w{i}", torch.full((10,), float(i))) for i in range(5)]
    shards = list(shards_of(iter(weights), max_bytes=80))
    assert [list(shard) for shard in shards] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    write_shards(shards, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as tensors:
            assert tensors.get_tensor(name)[0] == float(name[1])
    single = tmp_path / "single"
    single.mkdir()
    write_shards(shards_of(iter(weights), max_bytes=1000), single)
    assert [f.name for f in single.iterdir()] == ["model.safetensors"]
