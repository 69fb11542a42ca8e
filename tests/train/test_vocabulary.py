"""Added tokens: mean rows at first, trained, exported, merged, loaded back by transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_cells, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftcore.config import ModelSettings
from sftcore.model.load import load_for_decoding
from sftcore.model.vocabulary import new_token_ids
from sftcore.recipe import load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.export import export_run

NEW = ["<|fact|>", "<|end_of_fact|>"]
TEMPLATE = {"prompt": "<|fact|>{question}<|end_of_fact|>", "completion": "{answer}"}


def logits(model) -> torch.Tensor:
    ids = torch.tensor([[300, 5, 6, 301, 7]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def changes(**more) -> dict:
    return {"data": {"template": TEMPLATE}, "train": {"epochs": 2, "lr": 1e-2}, **more}


def test_added_tokens_begin_as_the_mean_row(tiny_model_folder):
    settings = ModelSettings(path=str(tiny_model_folder), dtype="float32", add_tokens=NEW)
    assert new_token_ids(settings) == [300, 301]
    rows = load_for_decoding(settings).get_input_embeddings().weight
    own = load_file(tiny_model_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape[0] == 302 and torch.equal(rows[:300], own)
    assert torch.allclose(rows[300], own.mean(0), atol=1e-6) and torch.equal(rows[300], rows[301])


def test_full_and_adapter_runs_train_and_export_added_tokens(tiny_recipe):
    model = {"model": {"add_tokens": NEW}}
    full = write_recipe(tiny_recipe, "full", **changes(**model))
    adapters = {
        name: write_recipe(tiny_recipe, name, **changes(**model, adapter={"kind": name, "r": 4}))
        for name in ("lora", "qlora")
    }
    run_cells([full, *adapters.values()], ranks=1)
    run_cells(
        [write_recipe(tiny_recipe, "two", **changes(**model, adapter={"kind": "lora", "r": 4}))], ranks=2
    )
    one, two = (load_file(f"runs/{n}/adapter/adapter_model.safetensors") for n in ("lora", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    exported = AutoModelForCausalLM.from_pretrained("runs/full/model", dtype=torch.float32)
    assert exported.config.vocab_size == 302
    assert not torch.equal(*exported.get_input_embeddings().weight[300:302])
    assert AutoTokenizer.from_pretrained("runs/full/model").convert_tokens_to_ids(NEW) == [300, 301]
    for name, path in adapters.items():
        settings = load_recipe(path).model.model_copy(
            update={"path": str(Path(f"runs/{name}/adapter").resolve())}
        )
        beside = logits(load_for_decoding(settings, quantised=name == "qlora"))
        export_run(Path("runs") / name, Path(f"{name}-merged"), merge=True)
        merged = AutoModelForCausalLM.from_pretrained(f"{name}-merged", dtype=torch.float32)
        assert merged.config.vocab_size == 302
        assert torch.allclose(logits(merged), beside, atol=1e-5)
    scores = evaluate(load_recipe(adapters["lora"]))
    assert scores["base"]["n"] == scores["tuned"]["n"] == 8


def test_peft_loads_an_adapter_with_added_tokens(tiny_recipe):
    from peft import PeftModel

    path = write_recipe(
        tiny_recipe, "p", **changes(model={"add_tokens": NEW}, adapter={"kind": "lora", "r": 4})
    )
    run_cells([path], ranks=1)
    base = AutoModelForCausalLM.from_pretrained(tiny_recipe["model"]["path"], dtype=torch.float32)
    base.resize_token_embeddings(302)
    theirs = logits(PeftModel.from_pretrained(base, "runs/p/adapter").eval())
    settings = load_recipe(path).model.model_copy(update={"path": str(Path("runs/p/adapter").resolve())})
    assert torch.allclose(theirs, logits(load_for_decoding(settings)), atol=1e-5)


@pytest.mark.slow
def test_a_new_run_goes_on_from_an_adapter(tiny_recipe):
    """Its first loss is the earlier run's next; other ranks are refused by name."""
    adapter = {"kind": "lora", "r": 4}
    first = write_recipe(tiny_recipe, "first", adapter=adapter)
    run_cells([first], ranks=1)
    more = {"init_adapter": "runs/first/adapter", "epochs": 1, "lr": 1e-9}
    again = write_recipe(tiny_recipe, "again", adapter=adapter, train=more)
    run_cells([again], ranks=1)
    one, two = (load_file(f"runs/{n}/adapter/adapter_model.safetensors") for n in ("first", "again"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    other = write_recipe(tiny_recipe, "other", adapter={"kind": "lora", "r": 8}, train=more)
    try:
        run_cells([other], ranks=1)
    except AssertionError as error:
        assert "another r" in str(error) and "set adapter.r as it was trained" in str(error)
    else:
        raise AssertionError("another rank was accepted")
