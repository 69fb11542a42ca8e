"""Probing and evaluating by several processes gives the bytes that one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launcher_commands import save, sftcore
from tiny import SUBJECTS, write_lines
from tiny_bert import write_bert

from sftcore.config import Recipe
from sftcore.errors import SftError, UserInputError
from sftcore.fsio import read_json
from sftcore.launcher.shares import _run_processes
from sftcore.recipe import load_recipe
from sftcore.shares import Share, share_of
from sftcore.stages.evaluate import evaluate, evaluate_share

PREDICTED = ("predictions.jsonl", "scores.json", "manifest.json")


def write_pairs() -> dict:
    """24 held-out pairs in two languages; label 1 where both sides name the same person."""
    rows = []
    for i in range(24):
        a, b = SUBJECTS[i % 12], SUBJECTS[(i + i % 3) % 12]
        texts = (f"{a} {i}", f"{b} {'x ' * (i % 5)}") if i % 2 else (f"是{a}吗", f"是不是{b}{'呢' * (i % 4)}")
        rows.append({"id": f"p{i}", "sentence1": texts[0], "sentence2": texts[1], "label": int(i % 3 == 0)})
    write_lines(Path("held.jsonl"), rows)
    write_lines(Path("pairs.jsonl"), [row | {"sentence1": row["sentence1"] + "?"} for row in rows])
    source = {"format": "pairs"}
    return {
        "task": "matching",
        "data": {"train": [source | {"path": "pairs.jsonl"}], "test": [source | {"path": "held.jsonl"}]},
    }


def recipe_at(recipe: dict, run: str, **changes) -> Recipe:
    return load_recipe(Path(save(recipe | changes, run=run)))


@pytest.mark.parametrize("kind", ["facts", "label texts", "generated texts"])
def test_any_number_of_shares_gives_the_same_predictions(tiny_recipe, kind):
    """Batches of two: three jobs get unlike numbers of items."""
    evaluation = {"max_new_tokens": 4, "batch_size": 2, "few_shot": 2}
    changes = {"evaluate": evaluation}
    if kind != "facts":
        changes |= write_pairs() | {"matching": {"predict": "generate" if kind[0] == "g" else "likelihood"}}
    whole, shared = (recipe_at(tiny_recipe, f"runs/{name}", **changes) for name in ("whole", "shared"))
    expected = evaluate(whole)
    assert expected.keys() == {"base", "fewshot"}
    said = [evaluate_share(shared, Share(job, 3)) for job in (0, 2)]
    assert "shard 2/3: base " in said[1] and "sftcore evaluate RECIPE --merge" in said[1]
    with pytest.raises(UserInputError, match=r"not all shards(.|\n)*0-of-3, 2-of-3(.|\n)*--shard i/N"):
        evaluate(shared, merge_only=True)
    assert evaluate_share(shared, Share(0, 3)) == said[0], "found again"
    evaluate_share(shared, Share(1, 3))
    assert evaluate(shared, merge_only=True) == expected
    for model in expected:
        ours, theirs = (Path(f"runs/{name}/eval/{model}") for name in ("shared", "whole"))
        assert not (ours / "shards").exists()
        for file in PREDICTED:
            assert (ours / file).read_bytes() == (theirs / file).read_bytes(), (model, file)


def test_shares_of_other_settings_are_not_merged(tiny_recipe):
    recipe = recipe_at(tiny_recipe, "runs/one")
    evaluate_share(recipe, Share(0, 2))
    longer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_new_tokens": 5})})
    write_lines(Path("runs/one/recipe.yaml"), [json.loads(longer.model_dump_json())])
    evaluate_share(longer, Share(1, 2))
    with pytest.raises(UserInputError, match="not all shards"):
        evaluate(longer, merge_only=True)


@pytest.mark.slow
def test_processes_on_this_machine_share_probe_and_evaluation(tiny_recipe):
    path = save(tiny_recipe, probe=tiny_recipe["probe"] | {"batch_rows": 12})
    for command in ("probe", "evaluate"):
        assert sftcore(command, path, "--run", "runs/whole").returncode == 0
        refused = sftcore(command, path, "--ranks-per-node", "2")
        assert refused.returncode == 2 and "not with --on debug" in refused.stderr
        done = sftcore(command, path, "--on", "node", "--ranks-per-node", "2")
        assert done.returncode == 0, done.stderr[-3000:]
    for file in ("levels.jsonl", "levels.manifest.json", *(f"eval/base/{name}" for name in PREDICTED)):
        assert Path("runs/tiny", file).read_bytes() == Path("runs/whole", file).read_bytes(), file
    assert "shard 1/2" in Path("runs/tiny/logs/evaluate-1.log").read_text()
    absent = save(tiny_recipe, name="absent", data={"train": [{"format": "facts", "path": "bad.jsonl"}]})
    Path("bad.jsonl").write_text('{"relation": "P19", "subject": "Ann", "answers": []}\n')
    wrong = sftcore("probe", absent, "--on", "node", "--ranks-per-node", "2")
    assert wrong.returncode == 2 and "ended with exit code 2\n" in wrong.stderr, wrong.stderr[-2000:]
    assert "bad.jsonl" in wrong.stderr and "start again" not in wrong.stderr, "again would not help"
    broken = save(tiny_recipe, name="broken", model={"path": "nowhere-at-all", "dtype": "float32"})
    failed = sftcore("probe", broken, "--on", "node", "--ranks-per-node", "2")
    assert failed.returncode not in (0, 75) and "Traceback" not in failed.stderr, failed.stderr[-2000:]


@pytest.mark.parametrize(("code", "again"), [(2, False), (3, False), (75, True), (1, True)])
def test_the_exit_code_of_a_share_is_handed_on(tmp_path, code, again):
    """Not that of another one, which was stopped for it."""
    ends = f"import sys, time; print('what it said'); sys.argv[1] == '0' and time.sleep(60); sys.exit({code})"
    with pytest.MonkeyPatch.context() as patch:
        start = [sys.executable, "-c", ends]
        own = SimpleNamespace(Popen=lambda line, **how: subprocess.Popen([*start, line[-1]], **how))
        patch.setattr("sftcore.launcher.shares.subprocess", own)
        with pytest.raises(SftError, match="what it said") as caught:
            _run_processes("probe", [["0"], ["1"]], tmp_path, has_gpus=False)
    assert caught.value.exit_code == code and "process 1 of 2" in str(caught.value)
    assert ("start again" in str(caught.value)) == again


def test_a_cluster_gets_an_array_and_a_job_that_merges(tiny_recipe):
    path = save(tiny_recipe)
    line = ["evaluate", path, "--on", "slurm", "--nodes", "2", "--gpus-per-node", "4", "--dry-run"]
    done = sftcore(*line, "--partition", "long")
    assert done.returncode == 0, done.stderr
    shares, merge = done.stdout.split("# evaluate-merge.sbatch")
    assert "#SBATCH --array=0-7" in shares and "#SBATCH --partition=long" in shares
    assert "#SBATCH --gpus-per-node=1" in shares and "#SBATCH --array" not in merge
    given = [next(x for x in script.splitlines() if x.startswith("set -- ")) for script in (shares, merge)]
    assert given[1] == f"{given[0]} --merge" and given[0].startswith("set -- evaluate ")
    line = ["probe", path, "--on", "node", "--ranks-per-node", "3", "--dry-run"]
    assert sftcore(*line).stdout.count("sftcore probe") == 3


def test_an_encoder_shares_its_batches(tiny_recipe, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    from sftcore.data.ledger import Ledger
    from sftcore.data.prompts import Prompter, PromptOptions
    from sftcore.data.splits import load_records
    from sftcore.data.tokens import load_tokenizer
    from sftcore.evaluate.pairs import judge_pairs

    Path("bert").mkdir()
    write_bert(Path("bert"))
    AutoModelForSequenceClassification.from_pretrained("bert").save_pretrained("bert")
    changes = write_pairs() | {"matching": {"mode": "encoder"}, "model": {"path": "bert", "dtype": "float32"}}
    recipe = recipe_at(tiny_recipe, "runs/bert", **changes)
    monkeypatch.setattr("sftcore.model.encoder.ROWS_PER_BATCH", 5)
    prompter = Prompter(PromptOptions.of(recipe), load_tokenizer("bert"))
    items = load_records(recipe, "test", Ledger())
    whole = judge_pairs(recipe, recipe.model.path, items, prompter)
    parts = [judge_pairs(recipe, recipe.model.path, items, prompter, share=Share(i, 2)) for i in (0, 1)]
    assert all((a is None) != (b is None) for a, b in zip(*parts, strict=True))
    assert [a or b for a, b in zip(*parts, strict=True)] == whole


def test_scores_follow_from_predictions_alone(tiny_recipe):
    recipe = recipe_at(tiny_recipe, "runs/one", **write_pairs(), matching={"predict": "generate"})
    evaluate(recipe)
    scores = read_json(Path("runs/one/eval/base/scores.json"))["pairs"]["test"]
    assert scores["n"] == 24 and scores["unparsable"] > 0 and scores["predicted_same"] == 0


@pytest.mark.parametrize(
    ("shard", "allowed"), [("3/3", "0/3 to 2/3"), ("5/1", "0/1"), ("0/0", "0/4 to 3/4"), ("x", "0/4 to 3/4")]
)
def test_a_share_that_is_none_is_told_those_there_are(shard, allowed):
    with pytest.raises(UserInputError, match=f"got: {shard}\n +allowed: (e.g. )?{allowed}$"):
        share_of(shard)
