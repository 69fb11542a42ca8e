"""A run's folder stands for its recipe; a plan comes before the probe; refusals leave no folder behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from launcher_commands import save, sftcore

from sftcore.catalogue import CATALOGUE

SELECTED = {
    "select": {"levels": [1, 2], "n": 6},
    "probe": {"templates": 2, "samples": 3, "max_new_tokens": 4},
}


def done(*arguments: str):
    found = sftcore(*arguments)
    assert found.returncode == 0, found.stderr[-3000:]
    return found


def test_every_command_takes_a_run_folder(tiny_recipe, tmp_path, monkeypatch):
    """Also from another folder, and where the run is not runs/NAME."""
    done("train", save(tiny_recipe), "--run", "elsewhere/mine")
    before = Path("elsewhere/mine/recipe.yaml").read_bytes()
    run = str(Path("elsewhere/mine").resolve())
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert "16 samples" in done("plan", run).stdout
    assert "[<eos>]" in done("inspect", run, "--n", "1").stdout
    assert done("prepare", run).stdout.startswith("16 samples of ")
    assert "tuned:" in done("evaluate", run).stdout
    assert "is finished" in done("train", run).stderr
    assert Path(run, "eval/tuned/scores.json").is_file() and not Path("runs").exists()
    assert Path(run, "recipe.yaml").read_bytes() == before
    moved = Path(run).rename("moved")  # its recipe still names the old place
    assert "tuned:" in done("evaluate", str(moved)).stdout and not Path(run).exists()


def test_other_folders_are_no_runs(tiny_recipe):
    Path("empty").mkdir()
    refused = sftcore("plan", "empty")
    assert refused.returncode == 2 and "not a run folder: no recipe.yaml" in refused.stderr


def test_a_plan_before_the_probe_is_as_if_any_facts_were_drawn(tiny_recipe):
    path = save(tiny_recipe, **SELECTED)
    planned = done("plan", path)
    assert "2 epochs of 6 samples" in planned.stdout
    assert "as if any 6 facts were drawn" in planned.stdout
    assert "24 facts x 2 wordings x 3 samples = 144 completions of up to 4 tokens, about" in planned.stdout
    outlook = json.loads(done("plan", path, "--json").stdout)["outlook"]
    assert outlook["probe"] | {"seconds": 0} == {
        "num_facts": 24,
        "num_prompts": 48,
        "num_completions": 144,
        "seconds": 0,
    }
    assert outlook["probe"]["seconds"] > 0
    assert not Path("runs").exists(), "a plan writes nothing there"


def test_a_plan_before_the_probe_refuses_more_facts_than_there_are(tiny_recipe):
    refused = sftcore("plan", save(tiny_recipe, **SELECTED | {"select": {"levels": [1], "n": 17}}))
    assert refused.returncode == 2 and "too few facts: 17 wanted" in refused.stderr


def test_a_plan_names_a_rate_for_all_weights_on_an_adapter_and_a_lone_step(tiny_recipe):
    lora = {"adapter": {"kind": "lora", "r": 2}, "batch": {"samples_per_step": 16, "capacity": 4096}}
    path = save(tiny_recipe, **lora, train={"epochs": 1})
    plain = done("plan", path).stdout
    assert "a rate for" not in plain and "1 step in all" in plain
    noted = done("plan", path, "--set", "train.lr=1e-5").stdout
    assert "train.lr 1e-05 is a rate for all weights" in noted
    noted = done("plan", path, "--set", "adapter.kind=none", "--set", "train.lr=2e-4").stdout
    assert "is a rate for adapters" in noted
    assert "note" not in done("plan", path, "--set", "train.epochs=2").stdout


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_run_keeps_the_rate_that_it_began_with(tiny_recipe, kind):
    """Also one of a version whose default was another."""
    train = {key: value for key, value in tiny_recipe["train"].items() if key != "lr"}
    path = save(tiny_recipe, train=train, adapter={"kind": kind, "r": 2}, checkpoint={"save_every_steps": 1})
    done("train", path, "--set", "train.lr=3e-5", "--max-steps", "1")
    done("train", path)
    written = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())
    assert written["train"]["lr"] == 3e-5
    refused = sftcore("train", path, "--set", "train.lr=1e-5")
    assert refused.returncode == 2 and "another train.lr" in refused.stderr


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("train", {"select": {"levels": [1], "n": 2}}),
        ("prepare", {"select": {"levels": [1], "n": 2}}),
        ("evaluate", {"data.test": []}),
        ("probe", {"data.relations": "none.json"}),
        ("run", {"model.path": "nowhere/at/all"}),
        ("train", {"adapter": {"kind": "lora", "targets": ["nothing_of_this_name"]}}),
    ],
)
def test_a_refused_recipe_leaves_no_folder(tiny_recipe, command, changes):
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    refused = sftcore(command, save(tiny_recipe), *sets)
    assert refused.returncode in (2, 3), refused.stderr
    assert not Path("runs").exists(), sorted(map(str, Path("runs").rglob("*")))


def test_a_refusal_keeps_a_folder_that_was_there(tiny_recipe):
    Path("runs/tiny").mkdir(parents=True)
    assert sftcore("train", save(tiny_recipe, select={"levels": [1], "n": 2})).returncode == 2
    assert Path("runs/tiny").is_dir()


@pytest.mark.parametrize(
    "path", ["gemma3-270m", ".cache/models/gemma3-270m", "models/gemma3-270m", "gema3-270m"]
)
def test_the_remedy_names_the_model_that_was_asked_for(tiny_recipe, path):
    refused = sftcore("plan", save(tiny_recipe, model={"path": path}))
    assert refused.returncode == 2 and "sftcore model pull gemma3-270m" in refused.stderr
    assert "smollm2" not in refused.stderr


def test_a_pulled_model_goes_by_its_name(tiny_recipe):
    name = next(iter(CATALOGUE))
    Path(".cache/models").mkdir(parents=True, exist_ok=True)
    os.symlink(tiny_recipe["model"]["path"], f".cache/models/{name}")
    assert "16 samples" in done("plan", save(tiny_recipe, model=tiny_recipe["model"] | {"path": name})).stdout


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_hub_that_cannot_be_reached_is_one_message(tiny_recipe, monkeypatch, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refused = sftcore("plan", save(tiny_recipe, model={"path": "some-org/some-model"}))
    assert refused.returncode == 3
    assert refused.stderr.count("\n") <= 3 and "Retrying" not in refused.stderr
    assert f"the hub ({endpoint}) can't be reached" in refused.stderr
    assert "sftcore model pull some-org/some-model" in refused.stderr
    pulled = sftcore("model", "pull", "some-org/some-model")
    assert (
        pulled.returncode == 3 and "can't be reached" in pulled.stderr and not Path(".cache/models").exists()
    )


def test_prepare_says_one_sentence_and_the_rest_as_json(tiny_recipe):
    path = save(tiny_recipe)
    said = done("prepare", path).stdout
    assert said.count("\n") == 1 and said.startswith("16 samples of ") and " from 16 rows: " in said
    manifest = json.loads(done("prepare", path, "--json").stdout)
    assert manifest["num_samples"] == 16 and Path(manifest["store"]).is_dir()
