"""An export that would give another model than the one that was trained is not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import start_ranks, wait_for_all, write_recipe
from miniature_runs import exported, recipe_for, save_base, take_steps

from sftcore.errors import TrainingFailed
from sftcore.model import sameness, weights
from sftcore.train import export

LORA = {"adapter": {"kind": "lora", "r": 4}}


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base("glm4_moe", tmp_path / "base")


def refused(base: Path, folder: Path, **changes: Any) -> str:
    with pytest.raises(TrainingFailed, match="loaded again, is not the one that was trained") as caught:
        exported(recipe_for(base, **changes), folder, take_steps)
    assert not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))
    return str(caught.value)


@pytest.mark.parametrize("has_room", [True, False])
def test_lost_weights_are_found(base, tmp_path, monkeypatch, has_room):
    plain = export.revert_weight_conversion

    def losing(model: Any, shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t for n, t in plain(model, shard).items() if "e_score_correction_bias" not in n}

    if has_room:
        monkeypatch.setattr(export, "revert_weight_conversion", losing)
        assert "e_score_correction_bias" in refused(base, tmp_path / "out")
        return
    no_room(monkeypatch, tmp_path)
    save = weights.save_file
    monkeypatch.setattr(weights, "save_file", lambda tensors, *a, **o: save(altered(tensors), *a, **o))
    assert "model.safetensors: " in refused(base, tmp_path / "out")


def no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 9 kB\n")
    monkeypatch.setattr(sameness, "MEMORY_FILE", tmp_path / "meminfo")


def altered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(tensors))
    return tensors | {name: tensors[name] + 1e-3}


def test_another_configuration_is_found(base, tmp_path, monkeypatch):
    plain = export._saved_config

    def bent(*args: Any) -> Any:
        config = plain(*args)
        config.routed_scaling_factor = 3.0
        return config

    monkeypatch.setattr(export, "_saved_config", bent)
    assert "the weights are right, but logits are off by" in refused(base, tmp_path / "out")


def test_an_adapter_of_another_scale_is_found(base, tmp_path, monkeypatch):
    plain = export.write_adapter

    def bent(model: Any, weights: Any, folder: Path) -> Any:
        written = plain(model, weights, folder)
        file = folder / "adapter_config.json"
        file.write_text(file.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
        return written

    monkeypatch.setattr(export, "write_adapter", bent)
    assert "the weights are right, but logits are off by" in refused(base, tmp_path / "out", **LORA)


@pytest.mark.parametrize("changes", [{}, LORA])
def test_without_room_for_the_model_the_files_are_compared(base, tmp_path, monkeypatch, changes):
    no_room(monkeypatch, tmp_path)
    monkeypatch.setattr(export, "check_export", lambda *_: pytest.fail("it was loaded"))
    exported(recipe_for(base, **changes), tmp_path / "out", take_steps)
    assert (tmp_path / "out").is_dir()


def test_exports_of_several_files_are_whole(base, tmp_path, monkeypatch):
    """Shards cut between layers; the buffers of layers come in the last."""
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    exported(recipe_for(base), tmp_path / "out", take_steps)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2


SCRIPT = """
import sys
from pathlib import Path
from sftcore.stages import train as training
from sftcore.recipe import load_recipe
from sftcore.errors import SftError
from sftcore.train import export
plain = export.revert_weight_conversion
def losing(model, shard):
    return {name: t for name, t in plain(model, shard).items() if 'up_proj' not in name}
export.revert_weight_conversion = losing
try:
    training.train_recipe(load_recipe(Path(sys.argv[1])))
except SftError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_end_with_what_rank_0_has_found(tiny_recipe, stage):
    Path("run_losing.py").write_text(SCRIPT)
    path = write_recipe(tiny_recipe, "lost", deepspeed=f"zero{stage}", train={"epochs": 1})
    ranks = start_ranks(2, "run_losing.py", str(path))
    assert wait_for_all(ranks) == [1, 1]
    for rank in ranks:
        assert "TrainingFailed the exported model, loaded again, is not the one" in "".join(rank.output())
    assert not Path("runs/lost/model").exists() and Path("runs/lost/checkpoints/step-000004").is_dir()
