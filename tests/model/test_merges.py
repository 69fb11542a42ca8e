"""Merges of each kind of adapter on each layout of weights: peft in memory = our memory = the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_runs import exported, recipe_for, save_base, take_steps
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcore.errors import UserInputError
from sftcore.model import merge
from sftcore.model.load import load_for_decoding, load_for_training
from sftcore.model.merge import merge_adapter
from sftcore.model.weight_files import check_unchanged
from sftcore.settings import CHECKSUMS

NEW = ["<|fact|>", "<|end_of_fact|>"]
KINDS = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True, "targets": ["down_proj", "c_proj", "fc2"]},
    "qlora": {"kind": "qlora"},
}
LAYOUTS = ("gpt2", "gemma3", "phi", "llama")  # transposed; nested with vision; biased head; plain
ROUTED = ("mixtral", "qwen3_moe", "olmoe")


def but_slow(names: tuple[str, ...], *slow: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.fixture
def base(request, tmp_path) -> Path:
    return save_base(request.param, tmp_path / request.param)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        return model(**inputs).logits.float()  # not .eval(): it changes how 4-bit layers compute on some CPUs


def own(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def check_merge(base: Path, tmp_path: Path, adapter: dict, add_tokens: list[str]) -> None:
    from peft import PeftModel

    model = {"path": str(base), "dtype": "float32", "add_tokens": add_tokens}
    names = {n.rpartition(".")[2] for n, _ in own(base).named_modules()}
    wished = [t for t in adapter.get("targets", []) if t in names]
    recipe = recipe_for(
        base, model=model, adapter={"r": 4} | adapter | ({"targets": wished} if wished else {})
    )
    exported(recipe, tmp_path / "adapter", take_steps)
    quantised = adapter["kind"] == "qlora"
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", recipe.model, quantised=quantised)
    assert "  model" in (tmp_path / "merged" / CHECKSUMS).read_text()
    check_unchanged(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 9, *tokenizer.convert_tokens_to_ids(add_tokens), 17, 33, 4, 80]])
    settings = recipe.model.model_copy(update={"path": str(tmp_path / "adapter")})
    ours = logits(load_for_decoding(settings, quantised=quantised), ids)
    before = logits(own(base), ids.clamp(max=200))
    assert (ours[:, :, :200] - before[:, :, :200]).abs().max() > 1e-3 * before.abs().max()
    merged = own(tmp_path / "merged")
    close = {"atol": 1e-4 * float(ours.abs().max())}
    assert torch.allclose(logits(merged, ids), ours, **close)
    if not quantised:
        theirs = own(base)
        if add_tokens:
            theirs.resize_token_embeddings(merged.get_input_embeddings().num_embeddings)
        assert torch.allclose(
            logits(PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")), ids), ours, **close
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", but_slow(LAYOUTS, "phi", "llama"), indirect=True)
def test_every_kind_on_every_layout(base, tmp_path, kind):
    check_merge(base, tmp_path, KINDS[kind], [])


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_added_tokens_are_merged_with_all_that_the_head_has(base, tmp_path):
    check_merge(base, tmp_path, KINDS["lora"], NEW)


@pytest.mark.parametrize("base", but_slow(ROUTED, "qwen3_moe", "olmoe"), indirect=True)
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_on_and_beside_experts(base, tmp_path, targets, kind):
    check_merge(base, tmp_path, {"kind": kind, "targets": targets}, [])


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_merges_come_in_shards_with_all_that_belongs_to_the_model(base, tmp_path, monkeypatch):
    recipe = recipe_for(base, adapter={"kind": "lora", "r": 4})
    exported(recipe, tmp_path / "adapter", take_steps)
    for name in ("LICENSE.txt", "NOTICE"):
        (base / name).write_text("terms\n")
    for name in ("spiece.model", "added_tokens.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    merge_adapter(tmp_path / "adapter", whole, recipe.model, quantised=False)
    monkeypatch.setattr(merge, "SHARD_BYTES", 170_000)
    merge_adapter(tmp_path / "adapter", parts, recipe.model, quantised=False)
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 171_000 for file in files)
    one, several = own(whole).state_dict(), own(parts).state_dict()
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    for folder in (whole, parts):
        copied = {"LICENSE.txt", "NOTICE", "spiece.model", "added_tokens.json", "tokenizer.json"}
        assert copied <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"dora": True}])
@pytest.mark.parametrize("base", ROUTED, indirect=True)
def test_what_experts_do_not_take_is_refused_before_training(base, change):
    adapter = {"kind": "lora", "r": 4}
    with pytest.raises(UserInputError, match=r"(?s)ParamWrapper does not work with.*outside of the experts"):
        load_for_training(recipe_for(base, adapter=adapter | change))
    load_for_training(recipe_for(base, adapter=adapter | change | {"targets": ["q_proj"]}))


@pytest.mark.parametrize("base", ["gemma3n_text", "gemma4_text"], indirect=True)
def test_tokens_can_not_be_added_where_each_layer_looks_them_up(base):
    model = {"path": str(base), "dtype": "float32", "add_tokens": NEW}
    with pytest.raises(UserInputError, match=r"(?s)in a table of their own.*got: .*per_layer"):
        load_for_training(recipe_for(base, model=model))


@pytest.mark.parametrize("base", LAYOUTS, indirect=True)
def test_added_tokens_are_exported_with_a_whole_model(base, tmp_path):
    model = {"path": str(base), "dtype": "float32", "add_tokens": NEW}
    held = exported(recipe_for(base, model=model), tmp_path / "out", take_steps)
    again = own(tmp_path / "out").state_dict()
    assert again.keys() == held.keys() and all(torch.equal(t, again[n]) for n, t in held.items())
