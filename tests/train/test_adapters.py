"""Adapters from recipe to merged model: what is trained, saved, merged and loaded is the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import BIN, run, run_cells, steps, weights_hash, write_recipe
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from sftcore.config import AdapterSettings, ModelSettings
from sftcore.errors import TrainingFailed, UserInputError
from sftcore.model.adapters import add_adapter, check_complete, trained_names
from sftcore.model.load import load_for_decoding
from sftcore.recipe import load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.export import export_run

KINDS = {
    "lora": {"kind": "lora", "alpha": 32},
    "rslora": {"kind": "lora", "alpha": 32, "rslora": True, "targets": ["q_proj", "up_proj"]},
    "dora": {"kind": "lora", "alpha": 32, "dora": True},
    "qlora": {"kind": "qlora", "alpha": 32, "targets": ["v_proj", "down_proj"]},
}
IDS = torch.arange(1, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def test_merged_models_give_the_logits_of_base_and_adapter(tiny_recipe):
    """Each kind is trained, evaluated, merged by the command and loaded by plain transformers."""
    paths = [
        write_recipe(tiny_recipe, name, adapter={"r": 4, **kind}, train={"epochs": 1})
        for name, kind in KINDS.items()
    ]
    run_cells(paths, ranks=1)
    base = tiny_recipe["model"]["path"]
    before = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    for name, kind in KINDS.items():
        folder = Path(f"runs/{name}/adapter")
        settings = ModelSettings(path=str(folder.resolve()), dtype="float32")
        beside = logits(load_for_decoding(settings, quantised=kind["kind"] == "qlora"))
        export_run(Path("runs") / name, Path(f"{name}-merged"), merge=True)
        merged = logits(AutoModelForCausalLM.from_pretrained(f"{name}-merged", dtype=torch.float32))
        moved = (beside - before).abs().max()
        assert moved > 0.02, "the adapter does something"
        assert torch.allclose(merged, beside, atol=1e-5), (name, (merged - beside).abs().max(), moved)
    scores = evaluate(load_recipe(paths[-1]))
    assert set(scores) == {"base", "tuned"} and scores["tuned"]["n"] == 8


def test_peft_itself_loads_what_is_exported(tiny_recipe):
    from peft import PeftModel

    path = write_recipe(tiny_recipe, "plain", adapter={"kind": "lora", "r": 4}, train={"epochs": 1})
    run_cells([path], ranks=1)
    copied = run(str(BIN / "sftcore"), "export", "runs/plain", "--to", "copy")
    assert copied.returncode == 0, copied.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(tiny_recipe["model"]["path"], dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(base, "copy").eval())
    ours = logits(load_for_decoding(ModelSettings(path="copy", dtype="float32")))
    assert torch.allclose(theirs, ours, atol=1e-6)
    for source, target, message in (
        ("runs/plain", "copy", "this folder exists"),
        ("runs", "x", "not a run folder"),
    ):
        with pytest.raises(UserInputError, match=message):
            export_run(Path(source), Path(target), merge=True)
    (Path("runs/plain/adapter")).rename("elsewhere")
    with pytest.raises(UserInputError, match="no result yet"):
        export_run(Path("runs/plain"), Path("x"), merge=False)


@pytest.mark.slow
def test_checkpoints_of_adapters_leave_frozen_weights_out_and_resume_to_the_bit(tiny_recipe):
    """Dropout 0.1, stages 0 to 3: cut after 4 of 8 steps (the export and the last save are taken away)."""
    names = []
    for stage in range(4):
        changes = {"adapter": {"kind": "lora", "r": 4, "dropout": 0.1}, "deepspeed": f"zero{stage}"}
        changes |= {"checkpoint": {"save_every_steps": 4}, "model": {"dtype": "bfloat16"}}
        names.append(f"bits{stage}")
        write_recipe(tiny_recipe, names[-1], **changes)
    paths = [Path(f"{name}.yaml") for name in names]
    run_cells(paths, ranks=2)
    hashes, losses = [weights_hash(n) for n in names], [[s["loss"] for s in steps(n)] for n in names]
    trained = sum(p.numel() for p in _tiny_with_adapter(AdapterSettings(kind="lora", r=4)).parameters())
    for name in names:
        folder = Path("runs") / name
        saved = sum(f.stat().st_size for f in (folder / "checkpoints/step-000004/ds").iterdir())
        assert saved < 4 * trained + 200_000, (name, saved)
        _delete(folder / "adapter")
        _delete(folder / "checkpoints/step-000008")
    assert run_cells(paths, ranks=2).count("resuming after step 4") == 4
    assert [weights_hash(n) for n in names] == hashes
    assert [[s["loss"] for s in steps(n)] for n in names] == losses


def _delete(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _tiny_with_adapter(settings: AdapterSettings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    add_adapter(model, settings, seed=5)
    return model


def test_the_seed_alone_decides_the_first_weights_and_only_they_are_trained():
    first = _tiny_with_adapter(AdapterSettings(kind="lora", r=4, targets=["q_proj"]))
    torch.rand(3)
    second = _tiny_with_adapter(AdapterSettings(kind="lora", r=4, targets=["q_proj"]))
    names = trained_names(first)
    assert len(names) == 4 and all("q_proj.lora_" in name for name in names)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("targets", [["q_porj"], ["lm_head"]])
def test_wrong_targets_are_refused_with_the_right_names(targets):
    with pytest.raises(UserInputError, match=r"(?s)no linear layer.*down_proj, gate_proj"):
        _tiny_with_adapter(AdapterSettings(kind="lora", targets=targets))


def test_an_empty_or_partial_adapter_is_refused():
    whole = {"a": torch.ones(2), "b": torch.ones(2)}
    check_complete(whole, wanted=2)
    with pytest.raises(TrainingFailed, match="1 of 2 weights"):
        check_complete({"a": torch.ones(2)}, wanted=2)
    with pytest.raises(TrainingFailed, match=r"1 of them empty \(such as b\)"):
        check_complete(whole | {"b": torch.empty(0)}, wanted=2)


def test_the_merge_refuses_another_base_and_writes_nothing(tiny_recipe, tmp_path):
    from sftcore.model.merge import merge_adapter

    path = write_recipe(tiny_recipe, "small", adapter={"kind": "lora", "r": 4}, train={"epochs": 1})
    run_cells([path], ranks=1)
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    settings = ModelSettings(path=str(tmp_path / "other"), dtype="float32")
    with pytest.raises(UserInputError, match=r"(?s)does not fit its base.*layers.1"):
        merge_adapter(Path("runs/small/adapter"), tmp_path / "out", settings, quantised=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "bare").mkdir()
    settings = ModelSettings(path=str(tmp_path / "bare"), dtype="float32")
    with pytest.raises(UserInputError, match="no safetensors"):
        merge_adapter(Path("runs/small/adapter"), tmp_path / "out", settings, quantised=False)


def test_a_merge_that_gives_another_model_is_not_written(tiny_recipe, tmp_path, monkeypatch):
    from sftcore.model import merge

    path = write_recipe(tiny_recipe, "broken", adapter={"kind": "lora", "r": 4}, train={"epochs": 1})
    run_cells([path], ranks=1)
    monkeypatch.setattr(merge, "merge_weight", lambda weight, *_, **__: weight)
    with pytest.raises(TrainingFailed, match="is not the one that was trained"):
        export_run(Path("runs/broken"), tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()
