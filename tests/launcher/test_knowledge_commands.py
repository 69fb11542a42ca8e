"""Shards of a probe, own relations, trivial facts, few-shot, drift and restoring, as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launcher_commands import save, sftcore
from tiny import write_lines

FILES = ("levels.jsonl", "levels.manifest.json", "levels.templates.json")
GUILD = {
    "guild": {
        "name": "guild",
        "domain": "in",
        "question": "Which guild has {subject} joined?",
        "completions": ["{subject} has joined the guild of", "The guild of {subject} is that of"],
    }
}


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_shards_of_a_probe_give_the_same_levels(tiny_recipe):
    path = save(tiny_recipe, probe=tiny_recipe["probe"] | {"batch_rows": 12})
    assert sftcore("probe", path, "--run", "runs/whole").returncode == 0
    for wrong, message in ((["--shard=2/2"], "0 to N-1"), (["--shard=0/2", "--merge"], "need all shards")):
        refused = sftcore("probe", path, *wrong)
        assert refused.returncode == 2 and message in refused.stderr
    first = sftcore("probe", path, "--shard", "0/2")
    assert first.returncode == 0 and "shard 0/2: 6 of 12 batches are done" in first.stdout, first.stderr
    early = sftcore("probe", path, "--merge")
    assert early.returncode == 2 and "6 of 12 batches were not probed yet" in early.stderr
    assert sftcore("probe", path, "--shard", "1/2").returncode == 0
    merged = sftcore("probe", path, "--merge")
    assert merged.returncode == 0 and "level 4" in merged.stdout, merged.stderr
    for name in FILES:
        assert Path("runs/tiny", name).read_bytes() == Path("runs/whole", name).read_bytes()


@pytest.mark.slow
def test_relations_of_ones_own_are_probed_and_asked(tiny_recipe):
    facts = [{"relation": "guild", "subject": name, "answers": ["the bakers"]} for name in ("Ann", "Bo")]
    write_lines(Path("guilds.jsonl"), facts)
    data = {"train": [{"format": "facts", "path": "guilds.jsonl"}]}
    unknown = sftcore("probe", save(tiny_recipe, data=data))
    assert unknown.returncode == 2 and "no wording is known for the relation 'guild'" in unknown.stderr
    Path("relations.json").write_text(json.dumps(GUILD))
    path = save(tiny_recipe, data=data | {"relations": "relations.json"})
    probed = sftcore("probe", path)
    assert probed.returncode == 0, probed.stderr
    assert [row["relation"] for row in rows_of("runs/tiny/levels.jsonl")] == ["guild", "guild"]
    inspected = sftcore("inspect", path, "--n", "1")
    assert inspected.returncode == 0 and "Which guild has" in inspected.stdout, inspected.stderr
    Path("relations.json").write_text("[1, 2]")
    refused = sftcore("inspect", path)
    assert refused.returncode == 2 and "not a table of relations" in refused.stderr
    absent = sftcore("probe", save(tiny_recipe, data=data | {"relations": "nowhere.json"}))
    assert absent.returncode == 2 and "data.relations: no such file" in absent.stderr


def test_trivial_facts_are_left_out_and_listed(tiny_recipe):
    facts = [
        {"id": "inside", "relation": "P131", "subject": "Wakefield Cathedral", "answers": ["Wakefield"]},
        {"id": "letter", "relation": "P131", "subject": "Ann", "answers": ["X"]},
        {"id": "plain", "relation": "P131", "subject": "Bo", "answers": ["Oslo"]},
    ]
    write_lines(Path("more.jsonl"), facts)
    data = tiny_recipe["data"] | {"train": [{"format": "facts", "path": "more.jsonl"}]}
    probed = sftcore("probe", save(tiny_recipe, data=data))
    listed = "(runs/tiny/ledger.train.jsonl)"
    assert f"2 facts left out: answer_in_subject 1, short_answer 1 {listed}" in probed.stderr
    assert probed.returncode == 0 and probed.stderr.count("left out") == 1, "nothing of the other splits"
    train = [row for row in rows_of("runs/tiny/levels.jsonl") if row["split"] == "train"]
    assert [row["id"] for row in train] == ["plain"]
    reasons = {row["row"]: row["reason"] for row in rows_of("runs/tiny/ledger.train.jsonl")}
    assert reasons == {1: "answer_in_subject", 2: "short_answer"}
    kept = save(tiny_recipe, name="kept", data=data | {"trivial_facts": "keep"})
    assert sftcore("probe", kept).returncode == 0
    assert len(rows_of("runs/kept/levels.jsonl")) == len(rows_of("runs/tiny/levels.jsonl")) + 2


def test_training_facts_that_are_all_trivial_are_refused(tiny_recipe):
    write_lines(Path("more.jsonl"), [{"relation": "P131", "subject": "Ann", "answers": ["X"]}])
    data = tiny_recipe["data"] | {"train": [{"format": "facts", "path": "more.jsonl"}]}
    refused = sftcore("probe", save(tiny_recipe, data=data))
    assert refused.returncode == 2 and "every training fact is trivial" in refused.stderr
    assert "got: short_answer 1" in refused.stderr and "data.trivial_facts: keep" in refused.stderr
    assert [row["reason"] for row in rows_of("runs/tiny/ledger.train.jsonl")] == ["short_answer"]


@pytest.fixture
def trained(tiny_recipe) -> str:
    """A recipe that was probed and trained; every held-out fact is made one of level 4."""
    path = save(tiny_recipe, evaluate={"max_new_tokens": 4, "few_shot": 2, "drift": True})
    for command in ("probe", "train"):
        assert sftcore(command, path).returncode == 0
    rows = rows_of("runs/tiny/levels.jsonl")
    known = [row | {"hits": row["trials"], "recall": 1.0, "level": 4} for row in rows]
    write_lines(Path("runs/tiny/levels.jsonl"), known)
    return path


def test_few_shot_and_drift_stand_beside_base_and_tuned(trained):
    done = sftcore("evaluate", trained)
    assert done.returncode == 0 and "fewshot:" in done.stdout, done.stderr
    rows = {
        name: rows_of(f"runs/tiny/eval/{name}/predictions.jsonl") for name in ("base", "tuned", "fewshot")
    }
    assert [row["id"] for row in rows["base"]] == [row["id"] for row in rows["fewshot"]]
    for zero, few in zip(rows["base"], rows["fewshot"], strict=True):
        *examples, last = few["prompt"].split("\n\n")
        assert len(examples) == 2 and last == zero["prompt"], few["prompt"]
        assert "\n\n" not in few["prediction"]
    drift = json.loads(Path("runs/tiny/eval/drift.json").read_text())
    assert drift["level"] == 4 and drift["n"] == 8 and drift["mean_kl_nats"] > 0
    again = sftcore("evaluate", trained)
    assert again.stderr.count("already evaluated") == 3


def test_restoring_everything_gives_the_base_model_back(trained, tiny_model_folder):
    run = Path("runs/tiny/model")
    options = ["--base", str(tiny_model_folder), "--tuned", str(run)]
    assert sftcore("restore", *options, "--to", "q").returncode == 2
    wrong = sftcore("restore", *options, "--to", "q", "--sweep", "1,two")
    assert wrong.returncode == 2 and "--sweep" in wrong.stderr
    swapped = ["--base", str(run), "--tuned", str(tiny_model_folder), "--to", "q", "--fraction", "1"]
    refused = sftcore("restore", *swapped)
    assert refused.returncode == 2 and "these two are swapped" in refused.stderr and not Path("q").exists()
    swept = sftcore("restore", *options, "--to", "q", "--sweep", "0,20,100")
    assert swept.returncode == 0 and swept.stdout.count("weights restored") == 3, swept.stderr
    assert re.match(r"q/q0: none of [\d,]+ weights restored\n", swept.stdout)
    names = ["base", "tuned", "q0", "q20", "q100"]
    folders = [tiny_model_folder, run, *(Path("q") / name for name in names[2:])]
    found = {}
    for name, folder in zip(names, folders, strict=True):
        done = sftcore("evaluate", trained, "--model", str(folder))
        assert done.returncode == 0, done.stderr
        found[name] = [
            row["prediction"] for row in rows_of(f"runs/tiny/eval/{folder.resolve().name}/predictions.jsonl")
        ]
    assert found["q0"] == found["tuned"] != found["base"] == found["q100"]
