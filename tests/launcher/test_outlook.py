"""What a plan comes to: verdict and exit code, stop token, hours, best configuration, as text and JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from families import REFUSED, config_of
from launcher_commands import save, sftcore

from sftcore.errors import MissingEnvironmentError, SftError, UserInputError
from sftcore.model.load import load_for_training
from sftcore.planning.outlook import (
    describe_stop,
    look_ahead,
    outlook_table,
    predict_hours,
    why_not_trainable,
)
from sftcore.recipe import load_recipe
from sftcore.train.devices import Device, choose_device

CPUS = Device(name="CPUs", is_gpu=False, memory_bytes=8 * 10**9)


def recipe_of(tiny_recipe, **changes):
    return load_recipe(Path(save(tiny_recipe, **changes)))


def bf16(tiny_recipe, **changes) -> dict:
    return tiny_recipe | {"model": tiny_recipe["model"] | {"dtype": "bfloat16"}} | changes


def test_hours_by_hand():
    """7.2e18 FLOPs, the slowest of 2 ranks with 10 % more: 3.96e18 / (40 % of 1e15 a second) = 9,900 s."""
    plan = {"world": 2, "totals": {"flops": 7.2e18, "imbalance": 0.1}}
    device = choose_device(memory_gigabytes=80, teraflops=1000)
    assert predict_hours(plan, device, 0.4) == pytest.approx(2.75)
    assert predict_hours(plan, device, 0.2) == pytest.approx(5.5)
    assert predict_hours(plan, CPUS, 0.4) is None


@pytest.mark.parametrize(
    ("targets", "trained", "share"),
    [([0, 0, 0, 0], "yes", 1.0), ([0, 5, 0, 0], "partly", 0.75), ([5, 6, 7, 8], "no", 0.0)],
)
def test_a_stop_token_is_trained_where_samples_end_with_it(tiny_recipe, targets, trained, share):
    from tiny import tiny_tokenizer

    store = SimpleNamespace(last_targets=np.array(targets, np.int32))
    found = describe_stop(recipe_of(tiny_recipe), store, tiny_tokenizer())
    assert found == {"trained": trained, "share": share, "stop_ids": [0]}


def test_the_verdict_is_that_of_training(tiny_recipe):
    """All problems at once; what only this environment lacks is told from what is wrong anywhere."""
    assert why_not_trainable(recipe_of(tiny_recipe), CPUS) is None
    muon = recipe_of(tiny_recipe, train={"optimizer": "muon"}, deepspeed="zero1")
    refusal = why_not_trainable(muon, choose_device("h100"))
    assert isinstance(refusal, UserInputError) and "set deepspeed: zero0" in str(refusal)
    zeropp = recipe_of(bf16(tiny_recipe), deepspeed="zeropp")
    assert why_not_trainable(zeropp, choose_device("h100")) is None
    refusal = why_not_trainable(zeropp, CPUS)
    assert isinstance(refusal, MissingEnvironmentError) and "take deepspeed: zero3" in str(refusal)
    wished = {"path": tiny_recipe["model"]["path"], "attention": "torch_varlen", "head": "liger"}
    refusal = why_not_trainable(recipe_of(tiny_recipe, deepspeed="zeropp", model=wished), CPUS)
    assert [p.where for p in refusal.problems] == ["deepspeed", "model.head", "model.attention"]
    assert isinstance(refusal, UserInputError)


def test_the_lines_name_hours_what_fits_and_the_best(tiny_recipe):
    """On 8 ranks the tiny model fits anywhere but on a GPU of 100 kB."""
    recipe = recipe_of(bf16(tiny_recipe))
    plan, outlook, refusal = look_ahead(recipe, world=8, device=choose_device("h100"), mfu=0.5)
    text = outlook_table(outlook, plan)
    assert refusal is None and outlook["best"] == "zero0" and outlook["hours"] > 0
    assert "h100, 80 GB, 989 bfloat16 TFLOP/s" in text and "989 TFLOP/s x 50% MFU" in text
    assert "stop token      yes: the last trained target of 100.0% of the samples" in text
    assert "* zero1" in text and "refused: offload to NVMe" in text
    small = choose_device(memory_gigabytes=0.0001)
    plan, outlook, _ = look_ahead(recipe, world=8, device=small, mfu=0.5)
    text = outlook_table(outlook, plan)
    assert outlook["best"] is None and not any(row["fits"] for row in outlook["ds_configs"])
    assert "none fits" in text and "not known without a GPU's rate" in text


def test_offload_as_the_best_comes_with_what_would_do_without():
    plan = {"world": 1, "totals": {"flops": 1e15, "imbalance": 0.0}}
    device = {"name": "g", "is_gpu": True, "memory_bytes": 1e10, "peak_flops": None, "usable_bytes": 9e9}
    row = {"name": "zero2-offload", "device_bytes": 1, "host_bytes": 2, "fits": True, "refusal": ""}
    outlook = {
        "device": device,
        "hours": None,
        "mfu": 0.4,
        "stop_token": {"trained": "not needed", "share": None},
        "compatible": True,
        "problems": [],
        "deepspeed": "zero2",
        "ds_configs": [row],
        "best": "zero2-offload",
        "would_fit": ["4 ranks (zero3: 8.0 GB)"],
    }
    text = outlook_table(outlook, plan)
    assert "these would fit without offload: 4 ranks (zero3: 8.0 GB)" in text
    assert "stop token      not needed\n" in text
    assert "none fits; these would: 4 ranks" in outlook_table(outlook | {"best": None}, plan)


def test_exit_codes_and_json_of_the_command(tiny_recipe):
    path = save(bf16(tiny_recipe))
    done = sftcore("plan", path, "--world", "2", "--gpu", "a100", "--mfu", "0.3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["world"] == 2 and found["totals"]["num_steps"] == 8
    outlook = found["outlook"]
    assert outlook["device"]["name"] == "a100" and outlook["mfu"] == 0.3 and outlook["compatible"]
    assert outlook["stop_token"]["share"] == 1.0
    assert {row["name"] for row in outlook["ds_configs"]} >= {"zero0", "zero3-offload", "zeropp"}
    refused = sftcore("plan", path, "--set", "train.optimizer=muon", "--json")
    assert refused.returncode == 2 and "set deepspeed: zero0" in refused.stderr
    assert json.loads(refused.stdout)["outlook"]["problems"][0]["got"] == "muon"
    unknown = sftcore("plan", path, "--gpu", "b100")
    assert unknown.returncode == 2 and "no data sheet" in unknown.stderr


def test_a_plan_needs_a_configuration_and_a_tokenizer_but_no_weights(tiny_recipe, tiny_model_folder):
    Path("half").mkdir()
    for file in tiny_model_folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (Path("half") / file.name).write_bytes(file.read_bytes())
    recipe = recipe_of(tiny_recipe, model={"path": "./half", "dtype": "bfloat16"})
    plan, outlook, refusal = look_ahead(recipe, world=8, device=choose_device("l40s"), mfu=0.4)
    assert refusal is None and outlook["best"] and plan["predictions"]["num_parameters"] == 28_192


def test_the_end_of_a_turn_counts_as_a_stop_token_where_chats_are_trained(tiny_recipe):
    """A base model's end of text is another token than the one that its chat template ends answers with."""
    from tiny import tiny_tokenizer
    from tiny_tokenizers import CHATML

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    Path("c.jsonl").write_text("")
    data = {"train": [{"format": "jsonl", "path": "c.jsonl"}]}
    chats = recipe_of(tiny_recipe, task="chat", data=data)
    store = SimpleNamespace(last_targets=np.array([end, end], np.int32))
    assert describe_stop(chats, store, tokenizer) == {"trained": "yes", "share": 1.0, "stop_ids": [0, end]}
    facts = describe_stop(recipe_of(tiny_recipe), store, tokenizer)
    assert facts == {"trained": "no", "share": 0.0, "stop_ids": [0]}


@pytest.mark.parametrize("family", ["cohere", "bloom", "gptj", "mamba", "stablelm"])
def test_what_training_refuses_is_refused_with_the_same_reason(tiny_recipe, tmp_path, family):
    """A miniature tells: no weights are there to be read."""
    config_of(family).save_pretrained(tmp_path / "model")
    for file in Path(tiny_recipe["model"]["path"]).glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    recipe = recipe_of(tiny_recipe, model={"path": str(tmp_path / "model"), "dtype": "float32"})
    refusal = why_not_trainable(recipe, CPUS)
    assert re.search(f"can't train in packs.*{REFUSED[family]}", refusal.problems[0].what)
    with pytest.raises(SftError, match="can't train in packs"):
        load_for_training(recipe)
