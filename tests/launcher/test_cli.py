"""The command line as a user types it: exit codes, one clear message, no traceback, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launcher_commands import save, sftcore

RECALL = {"probe": {"templates": 2, "samples": 3, "max_new_tokens": 4}}


def test_the_whole_path_from_facts_to_the_report(tiny_recipe):
    """Each command on its own, in order; numbers in files agree with each other."""
    path = save(tiny_recipe)
    prepared = sftcore("prepare", path)
    assert (
        prepared.returncode == 0
        and prepared.stdout.startswith("16 samples of ")
        and prepared.stdout.count("\n") == 1
    )
    probed = sftcore("probe", path)
    assert probed.returncode == 0 and "level 4" in probed.stdout, probed.stderr
    levels = [json.loads(line) for line in Path("runs/tiny/levels.jsonl").read_text().splitlines()]
    assert len(levels) == 24 and all(row["trials"] == 6 for row in levels)
    assert not Path("runs/tiny/levels.partial.jsonl").exists()
    planned = sftcore("plan", path, "--world", "2")
    assert planned.returncode == 0 and "8 over 2 epochs of 16 samples" in planned.stdout
    trained = sftcore("train", path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    evaluated = sftcore("evaluate", path)
    assert evaluated.returncode == 0 and "tuned:" in evaluated.stdout, evaluated.stderr[-3000:]
    for name in ("base", "tuned"):
        rows = [
            json.loads(x) for x in Path(f"runs/tiny/eval/{name}/predictions.jsonl").read_text().splitlines()
        ]
        scores = json.loads(Path(f"runs/tiny/eval/{name}/scores.json").read_text())
        assert scores["n"] == len(rows) == 8
        assert scores["correct"] == sum(row["correct"] for row in rows)
    reported = sftcore("report", "runs/tiny")
    assert reported.returncode == 0, reported.stderr
    report = json.loads(Path("runs/tiny/report.json").read_text())
    assert report["n"] == 8 and 0 <= report["acc_base"] <= 1 and "by_level" in report
    assert "<svg" in Path("runs/tiny/report.html").read_text()
    inspected = sftcore("inspect", path, "--n", "1")
    assert inspected.returncode == 0 and "[<eos>]" in inspected.stdout


@pytest.mark.slow
def test_probing_twice_and_probing_another_model(tiny_recipe):
    path = save(tiny_recipe, select={"levels": [0, 1, 2, 3, 4], "n": 6})
    early = sftcore("train", path)
    assert early.returncode == 2 and "run: sftcore probe RECIPE" in early.stderr
    assert sftcore("probe", path).returncode == 0
    again = sftcore("probe", path)
    assert again.returncode == 0 and "memory levels are already in" in again.stderr
    assert sftcore("prepare", path).returncode == 0
    chosen = [json.loads(line) for line in Path("runs/tiny/selection.jsonl").read_text().splitlines()]
    assert len(chosen) == 6 and all(row["split"] == "train" for row in chosen)
    manifest = json.loads(Path("runs/tiny/levels.manifest.json").read_text())
    Path("runs/tiny/levels.manifest.json").write_text(json.dumps(manifest | {"model_fingerprint": "other"}))
    refused = sftcore("prepare", path)
    assert refused.returncode == 2 and "belong to another model" in refused.stderr


@pytest.mark.slow
def test_preparing_in_shards_with_a_report(tiny_recipe):
    path = save(tiny_recipe, data=tiny_recipe["data"] | {"temperature": 2.0})
    refused = sftcore("prepare", path, "--merge")
    assert refused.returncode == 2 and "1 of 1 parts are missing" in refused.stderr
    assert sftcore("prepare", path, "--shard=2/2").returncode == 2
    refused = sftcore("prepare", path, "--shard", "0/2", "--check")
    assert refused.returncode == 2 and "need all shards" in refused.stderr
    done = [sftcore("prepare", path, "--shard", f"{i}/2", "--workers", "1") for i in (0, 1)]
    assert [run.returncode for run in done] == [0, 0] and "1 of 1 parts are done" in done[0].stdout
    merged = sftcore("prepare", path, "--merge", "--check")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.startswith("16 samples of ") and "16 of 16 rows" in merged.stdout
    assert json.loads(Path("runs/tiny/check.json").read_text())["num_samples"] == 16
    assert Path("runs/tiny/check.png").stat().st_size > 1000
    trained = sftcore("train", path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    plan = json.loads(Path("runs/tiny/plan.json").read_text())
    assert [(s["name"], s["num_samples"]) for s in plan["sources"]] == [("train.jsonl", 32)]
    steps = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert sum(step["num_samples_by_source"]["train.jsonl"] for step in steps) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"path": "./absent"}}, "no such model folder"),
        ({"data": {"train": [{"format": "fact", "path": "train.jsonl"}]}}, "'entityquestions', 'facts'"),
        ({"data": {"train": [{"format": "facts", "path": "empty.jsonl"}]}}, "empty.jsonl"),
        ({"data": {"train": [{"format": "facts", "path": "broken.jsonl"}]}}, "broken.jsonl"),
        ({"data": {"train": [{"format": "facts", "path": "train.jsonl"}], "max_length": 8}}, "overlength"),
        ({"deepspeed": "misspelt.json"}, "did you mean 'zero_optimization'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tiny_recipe, change, message):
    Path("empty.jsonl").touch()
    lines = Path("train.jsonl").read_text()
    Path("broken.jsonl").write_text(lines + '{"relation": "P19", "subject"\n')
    Path("misspelt.json").write_text('{"zero_optimisation": {"stage": 1}}')
    done = sftcore("train", save(tiny_recipe, **change))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert not Path("runs/tiny/model").exists() and not Path("runs/tiny/checkpoints").exists()


def test_a_folder_without_weights_and_one_without_a_model(tiny_recipe, tiny_model_folder):
    for name in ("bare", "half"):
        Path(name).mkdir()
    for file in tiny_model_folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (Path("half") / file.name).write_bytes(file.read_bytes())
    for folder, message in (("bare", "tokenizer"), ("half", "no causal LM can be loaded")):
        done = sftcore("train", save(tiny_recipe, model={"path": f"./{folder}"}))
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_run_in_use_is_refused(tiny_recipe):
    hold = "import time\nfrom pathlib import Path\nfrom sftcore.fsio import folder_lock\n"
    hold += "with folder_lock(Path('runs/tiny'), purpose='x'):\n"
    hold += "    print('held', flush=True)\n    time.sleep(60)\n"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    done = sftcore("train", save(tiny_recipe))
    holder.kill()
    holder.communicate()
    assert done.returncode == 2 and "in use for training by process" in done.stderr


def test_usage_errors_help_and_schema():
    assert sftcore("frobnicate").returncode == 2
    assert sftcore("train").returncode == 2
    helped = sftcore("--help")
    assert helped.returncode == 0 and "quickstart" in helped.stdout
    schema = sftcore("schema")
    assert json.loads(schema.stdout)["title"] == "Recipe"
