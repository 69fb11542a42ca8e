"""Text matching from a recipe to scores, on a tiny model: classes and label texts, files and predictions."""

from __future__ import annotations

import logging
import random
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from launching import BIN, launcher, run, weights
from packaged import packaged_model
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tiny import SUBJECTS, write_lines
from tiny_bert import write_bert
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import read_source
from sftcore.errors import UserInputError
from sftcore.fsio import read_json, read_jsonl
from sftcore.generate.score import continuation_scores
from sftcore.knowledge.templates import load_relations
from sftcore.planning.inspection import inspect_recipe
from sftcore.recipe import ASSETS, load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.match import match_pairs, recipe_of
from sftcore.stages.prepare import prepare
from sftcore.stages.train import train_recipe


def sftcore(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = run(str(BIN / "sftcore"), *arguments)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def save(recipe: dict, **changes) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return "recipe.yaml"


def pairs(start: int, stop: int) -> list[dict]:
    """Label 1 where both sides name the same person."""
    rows = []
    for i in range(start, stop):
        a, b = SUBJECTS[i % 12], SUBJECTS[(i + i % 3) % 12]
        label = int(i % 3 == 0)
        why = "one name" if label else f"{a} is not {b}"
        rows.append({"id": f"p{i}", "sentence1": f"{a} {i}", "sentence2": f"{b} {i}", "label": label})
        rows[-1]["rationale"] = why
    return rows


@pytest.fixture
def recipe(tiny_recipe) -> dict:
    write_lines(Path("pairs.jsonl"), pairs(0, 24))
    write_lines(Path("held.jsonl"), pairs(24, 36))
    return tiny_recipe | {
        "task": "matching",
        "data": {
            "train": [{"format": "pairs", "path": "pairs.jsonl"}],
            "test": [{"format": "pairs", "path": "held.jsonl"}],
        },
        "train": {"epochs": 3, "lr": 1e-2},
    }


def classes_alone(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Logits of plain transformers, all prompts in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        return model(**rows).logits


def test_a_classifier_from_recipe_to_scores(recipe):
    """The folder that training writes is transformers' own, and gives the scores that we report."""
    path = save(recipe, matching={"mode": "discriminative"})
    loaded = load_recipe(Path(path))
    with pytest.raises(UserInputError, match="no classifier yet(.|\n)*sftcore train"):
        evaluate(loaded)
    assert any("-> class [" in line for line in inspect_recipe(loaded, num_samples=2, colour=False))
    trained = sftcore("train", path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    steps = read_jsonl(Path("runs/tiny/metrics.jsonl"))
    assert all(step["num_trained_tokens"] == step["num_samples"] for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert evaluate(loaded).keys() == {"tuned"}
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    folder = Path("runs/tiny/model")
    assert read_json(folder / "config.json")["architectures"] == ["LlamaForSequenceClassification"]
    logits = classes_alone(folder, [row["prompt"] for row in rows])
    margins = (logits[:, 1] - logits[:, 0]).tolist()
    assert [row["score"] for row in rows] == pytest.approx(margins, abs=1e-4)
    assert len({round(margin, 4) for margin in margins}) > 6
    scores = read_json(Path("runs/tiny/eval/tuned/scores.json"))
    assert scores["pairs"]["test"]["majority_accuracy"] == pytest.approx(8 / 12)
    assert scores["correct"] == sum(
        (m > 0) == (row["label"] == "same") for m, row in zip(margins, rows, strict=True)
    )

    Path("mine.tsv").write_text(
        "left\tright\n" + "".join(f"{r['sentence1']}\t{r['sentence2']}\n" for r in pairs(24, 36)) + "x\t\n"
    )
    arguments = ["match", str(folder.parent), "--pairs", "mine.tsv", "--a", "left", "--b", "right"]
    matched = sftcore(*arguments)
    assert matched.returncode == 0 and "12 pairs scored" in matched.stdout, matched.stderr[-3000:]
    first = Path("scores.jsonl").read_bytes()
    refused = sftcore(*arguments)
    assert refused.returncode == 2 and "scores.jsonl: is there already" in refused.stderr
    assert "scores.jsonl.ledger.jsonl: is there already" in refused.stderr and "--overwrite" in refused.stderr
    again = sftcore(*arguments, "--overwrite")
    assert again.returncode == 0 and Path("scores.jsonl").read_bytes() == first
    mine = read_jsonl(Path("scores.jsonl"))
    assert [row["score"] for row in mine] == pytest.approx(margins, abs=1e-4)
    assert [row["row"] for row in mine] == list(range(1, 13))
    ledger = read_jsonl(Path("scores.jsonl.ledger.jsonl"))
    assert [row["reason"] for row in ledger if row["kind"] == "rejected"] == ["empty_prompt"]
    with pytest.raises(UserInputError, match="no matching.json"):
        match_pairs(Path(recipe["model"]["path"]), Path("mine.tsv"), Path("x"), columns=("left", "right"))
    with pytest.raises(UserInputError, match="no column 'middle'"):
        match_pairs(folder, Path("mine.tsv"), Path("x"), columns=("left", "middle"))


def test_a_classifier_of_two_layers_on_the_mean_state_is_saved_apart(recipe):
    """Plain transformers gets the decoder, and warns rather than judge with another classifier."""
    path = save(recipe, matching={"mode": "discriminative", "pooling": "mean", "layers": 2})
    done = sftcore("run", path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path("runs/tiny/model")
    classifier = load_file(folder / "classifier.safetensors")
    assert {name: tuple(t.shape) for name, t in classifier.items()} == {
        "score.dense.weight": (32, 32),
        "score.dense.bias": (32,),
        "score.out.weight": (2, 32),
    }
    assert read_json(folder / "config.json")["architectures"] == ["LlamaModel"]
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    for row in rows:
        with torch.no_grad():
            states = decoder(**tokenizer(row["prompt"], return_tensors="pt")).last_hidden_state[0]
        hidden = torch.tanh(
            states.mean(0) @ classifier["score.dense.weight"].T + classifier["score.dense.bias"]
        )
        different, same = (classifier["score.out.weight"] @ hidden).tolist()
        assert row["score"] == pytest.approx(same - different, abs=1e-4)
    texts = "".join(f"{r['sentence1']}\t{r['sentence2']}\n" for r in pairs(24, 36))
    Path("mine.tsv").write_text("sentence1\tsentence2\n" + texts)
    match_pairs(folder, Path("mine.tsv"), Path("to.jsonl"), columns=("sentence1", "sentence2"))
    scores = [row["score"] for row in read_jsonl(Path("to.jsonl"))]
    assert scores == pytest.approx([row["score"] for row in rows], abs=1e-5)


def test_a_classifier_beside_low_rank_updates_is_saved_loaded_and_merged(recipe):
    """RUN/adapter is peft's own; merged, it is a classifier for plain transformers; all give our scores."""
    adapter = {"kind": "lora", "r": 4}
    changes = {"adapter": adapter, "train": {"epochs": 6, "lr": 3e-3}, "evaluate": {"few_shot": 2}}
    path = save(recipe, matching={"mode": "discriminative"}, **changes)
    trained = sftcore("train", path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    steps = read_jsonl(Path("runs/tiny/metrics.jsonl"))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert evaluate(load_recipe(Path(path))).keys() == {"tuned"}, "no few-shot: the base has no classifier"
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    prompts = [row["prompt"] for row in rows]

    folder = Path("runs/tiny/adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    merged = sftcore("export", "runs/tiny", "--to", "merged", "--merge")
    assert merged.returncode == 0, merged.stderr[-3000:]
    assert read_json(Path("merged/config.json"))["architectures"] == ["LlamaForSequenceClassification"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        beside = plain(**inputs).logits
    for logits in (beside, classes_alone(Path("merged"), prompts)):
        margins = (logits[:, 1] - logits[:, 0]).tolist()
        assert [row["score"] for row in rows] == pytest.approx(margins, abs=1e-3)
    texts = "".join(f"{r['sentence1']}\t{r['sentence2']}\n" for r in pairs(24, 36))
    Path("mine.tsv").write_text("sentence1\tsentence2\n" + texts)
    match_pairs(Path("merged"), Path("mine.tsv"), Path("to.jsonl"), columns=("sentence1", "sentence2"))
    scores = [row["score"] for row in read_jsonl(Path("to.jsonl"))]
    assert scores == pytest.approx([row["score"] for row in rows], abs=1e-3)


@pytest.mark.slow
def test_a_classifier_on_two_ranks_equals_one(recipe):
    changes = {"matching": {"mode": "discriminative"}, "deepspeed": "zero3"}
    alone = run(str(BIN / "sftcore"), "train", save(recipe, **changes), "--run", "runs/one")
    assert alone.returncode == 0, alone.stderr[-3000:]
    worker = str(Path(__file__).parent.parent.parent / "launcher" / "worker.py")
    both = run(*launcher(2), worker, save(recipe, **changes), "--run", "runs/two")
    assert both.returncode == 0, (both.stdout + both.stderr)[-3000:]
    one, two = weights("one"), weights("two")
    assert one["score.weight"].shape == (2, 32)
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-4), name


def letters(start: int, stop: int) -> list[dict]:
    """Label 1 where both sides hold the same letters."""
    rows = []
    for i in range(start, stop):
        a, b = "abcdefgh"[i % 8], "abcdefgh"[(i + i % 3) % 8]
        texts = {"sentence1": f"{a} {a} c {'d ' * (i % 5)}", "sentence2": f"{b} c {'e ' * (i % 7)}"}
        rows.append({"id": f"p{i}", **texts, "label": int(a == b)})
    return rows


def test_an_encoder_from_recipe_to_scores(recipe):
    """Through the same trainer and schedule; the folder is transformers' own and gives our scores."""
    Path("bert").mkdir()
    write_bert(Path("bert"))
    write_lines(Path("pairs.jsonl"), letters(0, 48))
    write_lines(Path("held.jsonl"), letters(48, 60))
    data = recipe["data"] | {"max_length": 32}
    model = {"path": "bert", "dtype": "float32"}
    path = save(recipe, model=model, data=data, matching={"mode": "encoder"}, train={"epochs": 8, "lr": 1e-2})
    done = sftcore("run", path)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = read_jsonl(Path("runs/tiny/metrics.jsonl"))
    first, last = (sum(step["loss"] for step in part) for part in (steps[:6], steps[-6:]))
    assert last < first
    folder = Path("runs/tiny/model")
    assert read_json(folder / "config.json")["architectures"] == ["BertForSequenceClassification"]
    assert AutoConfig.from_pretrained(folder).id2label == {0: "different", 1: "same"}
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    for row, pair in zip(rows, letters(48, 60), strict=True):
        inputs = tokenizer(pair["sentence1"].strip(), pair["sentence2"].strip(), return_tensors="pt")
        with torch.no_grad():
            ((different, same),) = theirs(**inputs).logits.tolist()
        assert row["score"] == pytest.approx(same - different, abs=1e-4)
    texts = "".join(f"{r['sentence1']}\t{r['sentence2']}\n" for r in letters(48, 60))
    Path("mine.tsv").write_text("sentence1\tsentence2\n" + texts)
    matched = sftcore("match", str(folder), "--pairs", "mine.tsv")
    assert matched.returncode == 0, matched.stderr[-3000:]
    scores = [row["score"] for row in read_jsonl(Path("scores.jsonl"))]
    assert scores == pytest.approx([row["score"] for row in rows], abs=1e-5)


@pytest.fixture
def scorer(recipe) -> Path:
    """A classifier that a run trained, with a corpus's own column names."""
    rows = [{"text_a": r["sentence1"], "text_b": r["sentence2"], "label": r["label"]} for r in pairs(0, 9)]
    write_lines(Path("pairs.jsonl"), rows)
    data = {"train": [{"preset": "lcqmc", "path": "pairs.jsonl"}]}
    train_recipe(load_recipe(Path(save(recipe, data=data, matching={"mode": "discriminative"}))))
    return Path("runs/tiny/model")


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("raw.tsv", "Ann 1\tBob 1\t0\nAnn 2\tAnn 3\t1\n", None),
        ("two.tsv", "Ann 1\tBob 1\nAnn 2\tAnn 3\n", None),
        ("lcqmc.tsv", "text_a\ttext_b\tlabel\nAnn 1\tBob 1\t0\nAnn 2\tAnn 3\t1\n", None),
        ("bq.csv", "sentence1,sentence2\nAnn 1,Bob 1\nAnn 2,Ann 3\n", None),
        ("qqp.tsv", "id\tquestion1\tquestion2\n7\tAnn 1\tBob 1\n8\tAnn 2\tAnn 3\n", None),
        ("qqp.jsonl", '{"question1": "Ann 1", "question2": "Bob 1"}\n' * 2, None),
        ("numbered.tsv", "7\tAnn 1\tBob 1\n8\tAnn 2\tAnn 3\n", ("1", "2")),
        ("headed.tsv", "text_a\ttext_b\nAnn 1\tBob 1\nAnn 2\tAnn 3\n", ("0", "1")),
        ("named.tsv", "left\tright\nAnn 1\tBob 1\nAnn 2\tAnn 3\n", ("left", "right")),
    ],
)
def test_pairs_are_found_in_the_files_that_people_have(scorer, name, text, columns):
    Path(name).write_text(text)
    assert match_pairs(scorer, Path(name), Path("to.jsonl"), columns=columns or (None, None)) == 2
    first, second = read_jsonl(Path("to.jsonl"))
    assert (first["sentence1"], first["sentence2"]) == ("Ann 1", "Bob 1")
    assert second["row"] == 2


def test_the_file_of_pairs_and_a_folder_are_never_written_over(scorer):
    Path("mine.tsv").write_text("text_a\ttext_b\nAnn 1\tBob 1\n")
    for to, message in (("mine.tsv", "the file of the pairs itself"), (".", "a folder")):
        for overwrite in (False, True):
            with pytest.raises(UserInputError, match=message):
                match_pairs(scorer, Path("mine.tsv"), Path(to), overwrite=overwrite)
    assert Path("mine.tsv").read_text().startswith("text_a")


def test_a_run_without_a_result_scores_nothing(recipe):
    Path("begun").mkdir()
    Path("begun/recipe.yaml").write_text("name: begun\n")
    with pytest.raises(UserInputError, match="begun: this run has no result yet"):
        match_pairs(Path("begun"), Path("mine.tsv"), Path("to.jsonl"))


def test_columns_that_are_not_there_name_the_options_of_the_command(scorer):
    Path("odd.tsv").write_text("7\tAnn 1\tBob 1\tx\n")
    with pytest.raises(UserInputError, match="no column 'text_a'(.|\n)*give --a and --b: .* 0-based numbers"):
        match_pairs(scorer, Path("odd.tsv"), Path("to.jsonl"))
    with pytest.raises(UserInputError, match=r"no column 9(.|\n)*give --a and --b"):
        match_pairs(scorer, Path("odd.tsv"), Path("to.jsonl"), columns=("1", "9"))
    write_lines(Path("odd.jsonl"), [{"q": "Ann"}])
    with pytest.raises(UserInputError, match=r"no usable pair(.|\n)*missing_field(.|\n)*give --a and --b"):
        match_pairs(scorer, Path("odd.jsonl"), Path("to.jsonl"))
    with pytest.raises(UserInputError, match="columns by number(.|\n)*name the fields in --a and --b"):
        match_pairs(scorer, Path("odd.jsonl"), Path("to.jsonl"), columns=("0", "1"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "gbk.tsv",
            "句子甲\t句子乙\t标签\n几点开门\t何时开门\t1\n".encode("gbk"),
            "not UTF-8(.|\n)*do: .*iconv -f ENCODING",
        ),
        (
            "raw.tsv",
            "几点开门\t何时开门\t1\n".encode("gbk"),
            "undecodable_bytes\n(.|\n)*do: .*iconv -f ENCODING",
        ),
        ("empty.tsv", b"", "no pair in this file(.|\n)*do: give a file with a pair in each row"),
        ("header.csv", b"text_a,text_b\n", "no pair in this file(.|\n)*do: give a file"),
        ("blank.jsonl", b'{"text_a": "", "text_b": "x"}\n', "row 1: empty_prompt\n(.|\n)*do: fix"),
    ],
)
def test_files_without_a_usable_pair_are_told_what_to_do(scorer, name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(UserInputError, match=message):
        match_pairs(scorer, Path(name), Path("to.jsonl"))


def test_what_was_noted_is_kept_where_no_row_was_rejected(scorer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sftcore"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sftcore.matching")
    Path("same.tsv").write_text("text_a\ttext_b\nAnn 1\tAnn 1\nAnn １\tBob\n")
    assert match_pairs(scorer, Path("same.tsv"), Path("to.jsonl")) == 2
    noted = read_jsonl(Path("to.jsonl.ledger.jsonl"))
    assert [(row["row"], row["change"]) for row in noted] == [(1, "identical_sides"), (2, "full_width")]
    assert "-1" not in str(noted)
    assert "notes: identical_sides 1, full_width 1 (to.jsonl.ledger.jsonl)" in caplog.text
    Path("plain.tsv").write_text("text_a\ttext_b\nAnn 1\tBob 1\n")
    assert match_pairs(scorer, Path("plain.tsv"), Path("to.jsonl"), overwrite=True) == 1
    assert not Path("to.jsonl.ledger.jsonl").exists()


@pytest.mark.parametrize("labels", ["01", "\uff10\uff11"], ids=["plain", "full-width"])
def test_a_column_of_labels_is_no_text(scorer, labels):
    rows = "".join(f"Ann {i}\t{labels[i % 2]}\tBob {i}\n" for i in range(4))
    Path("swapped.tsv").write_text("text_a\ttext_b\tlabel\n" + rows)
    with pytest.raises(UserInputError, match="no usable pair(.|\n)*label_as_text(.|\n)*give --a and --b"):
        match_pairs(scorer, Path("swapped.tsv"), Path("to.jsonl"))
    assert match_pairs(scorer, Path("swapped.tsv"), Path("to.jsonl"), columns=("text_a", "label")) == 4


def test_pairs_longer_than_an_encoder_has_positions_are_listed_not_scored(recipe, caplog):
    Path("bert").mkdir()
    write_bert(Path("bert"))
    long = {"id": "long", "sentence1": "a " * 20, "sentence2": "b " * 20, "label": 0}
    write_lines(Path("pairs.jsonl"), letters(0, 12))
    write_lines(Path("held.jsonl"), [*letters(48, 52), long])
    changes = {"data": recipe["data"] | {"max_length": 32}, "matching": {"mode": "encoder"}}
    loaded = load_recipe(Path(save(recipe, model={"path": "bert", "dtype": "float32"}, **changes)))
    train_recipe(loaded)
    assert evaluate(loaded)["tuned"]["n"] == 4
    (row,) = (r for r in read_jsonl(Path("runs/tiny/ledger.test.jsonl")) if r["kind"] == "rejected")
    assert (row["reason"], row["detail"]) == ("overlength", "43 tokens, 32 fit")
    assert "1 of 5 held-out items are longer" in caplog.text
    folder = Path("runs/tiny/model")
    assert match_pairs(folder, Path("held.jsonl"), Path("to.jsonl")) == 4
    assert len(read_jsonl(Path("to.jsonl"))) == 4
    (row,) = (r for r in read_jsonl(Path("to.jsonl.ledger.jsonl")) if r["kind"] == "rejected")
    assert (row["row"], row["reason"]) == (5, "overlength")
    write_lines(Path("held.jsonl"), [long])
    with pytest.raises(UserInputError, match="no usable pair(.|\n)*row 1: overlength"):
        match_pairs(folder, Path("held.jsonl"), Path("new.jsonl"))
    with pytest.raises(UserInputError, match="nothing to evaluate on(.|\n)*ledger.test.jsonl"):
        evaluate(loaded)


@pytest.mark.parametrize("predict", ["likelihood", "generate"])
def test_pairs_longer_than_a_decoder_has_positions_are_listed_not_scored(recipe, tiny_model_folder, predict):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    sizes = {"n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained("gpt")
    tokenizer.save_pretrained("gpt")
    long = {"id": "long", "sentence1": "a " * 40, "sentence2": "b", "label": 0}
    write_lines(Path("held.jsonl"), [*pairs(24, 28), long])
    model = {"path": "gpt", "dtype": "float32"}
    loaded = load_recipe(Path(save(recipe, model=model, matching={"predict": predict})))
    assert evaluate(loaded)["base"]["n"] == 4


def asked_and_told(split: str, n: int) -> list[dict]:
    """Questions about shipped facts beside a sentence's beginning: of the same relation, or of another."""
    relations, draw = load_relations(), random.Random(0)
    facts = read_jsonl(ASSETS / "facts" / f"{split}.jsonl")
    rows = []
    for i, fact in enumerate(draw.sample(facts, n)):
        others = sorted(relations.keys() - {fact["relation"]})
        told = relations[fact["relation"] if i % 2 else draw.choice(others)]
        question = relations[fact["relation"]].question.replace("{subject}", fact["subject"])
        beginning = draw.choice(told.completions[:8]).replace("{subject}", fact["subject"])
        rows.append({"sentence1": question, "sentence2": beginning, "label": i % 2})
    return rows


@pytest.mark.slow
def test_a_real_encoder_learns_which_texts_ask_for_the_same(recipe):
    write_lines(Path("pairs.jsonl"), asked_and_told("train", 400))
    write_lines(Path("held.jsonl"), asked_and_told("test", 200))
    settings = {
        "model": {"path": str(packaged_model("minilm-l6")), "dtype": "float32"},
        "matching": {"mode": "encoder"},
    }
    data, train = recipe["data"] | {"max_length": 128}, {"epochs": 3, "lr": 1e-4, "scheduler": "linear"}
    done = sftcore("run", save(recipe, data=data, train=train, batch={"samples_per_step": 16}, **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    assert len(rows) == 200 and sum(row["correct"] for row in rows) > 120, "luck gives 120 once in 400 times"


def test_label_texts_are_compared_or_generated(recipe):
    path = save(recipe, matching={"rationale": "after"}, select={"n": 12, "balance": "label", "draw": 1})
    done = sftcore("run", path)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = read_jsonl(Path("runs/tiny/selection.jsonl"))
    assert sorted(row["label"] for row in drawn) == [0] * 6 + [1] * 6
    assert evaluate(load_recipe(Path(path))).keys() == {"base", "tuned"}
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    assert all(row["parsed"] and row["prediction"] in ("same", "different") for row in rows)
    assert all((row["score"] > 0) == (row["prediction"] == "same") for row in rows)
    path = save(recipe, matching={"predict": "generate"}, name="base")
    scores = evaluate(load_recipe(Path(path)))["base"]["pairs"]["test"]
    assert scores["unparsable"] == scores["n"] == 12, "a random model writes no label"


def test_the_answer_is_label_and_rationale_in_the_order_asked(recipe):
    texts = {}
    for order in ("none", "before", "after"):
        loaded = load_recipe(Path(save(recipe, matching={"rationale": order})))
        prompter = Prompter(PromptOptions.of(loaded), AutoTokenizer.from_pretrained(loaded.model.path))
        source = loaded.data.train[0]
        record = next(iter(read_source(source, split="train", labels=loaded.matching.labels)))
        texts[order] = prompter.answer_text(record)
    assert texts == {
        "none": " same",
        "before": " one name\nConclusion: same",
        "after": " same\nReason: one name",
    }


def test_pairs_without_rationale_are_refused_by_an_arm_with_one(recipe):
    write_lines(
        Path("pairs.jsonl"), [{k: v for k, v in row.items() if k != "rationale"} for row in pairs(0, 9)]
    )
    with pytest.raises(UserInputError, match="no_rationale: 9(.|\n)*sftcore rationales"):
        prepare(load_recipe(Path(save(recipe, matching={"rationale": "before"}))))


def test_examples_stand_before_each_prompt(recipe):
    shown = [{"a": "Ann 1", "b": "Ann 1", "label": 1}, {"a": "Ann 1", "b": "Bob 1", "label": 0}]
    scores = evaluate(load_recipe(Path(save(recipe, matching={"examples": shown}))))
    assert scores["base"]["n"] == 12
    row = read_jsonl(Path("runs/tiny/eval/base/predictions.jsonl"))[0]
    head = (
        "Text 1: Ann 1\nText 2: Ann 1\nMeaning: same\n\nText 1: Ann 1\nText 2: Bob 1\nMeaning: different\n\n"
    )
    assert row["prompt"] == head + "Text 1: Ann 24\nText 2: Ann 24\nMeaning:"


def test_the_base_model_is_scored_behind_solved_training_pairs(recipe):
    path = save(recipe, evaluate={"few_shot": 2}, matching={"labels": {"en": ["no", "yes"]}})
    assert evaluate(load_recipe(Path(path))).keys() == {"base", "fewshot"}
    prompts = [row["prompt"] for row in read_jsonl(Path("runs/tiny/eval/fewshot/predictions.jsonl"))]
    head, asked = prompts[0].rsplit("\n\n", 1)
    assert asked == "Text 1: Ann 24\nText 2: Ann 24\nMeaning:"
    assert sorted(line for line in head.split("\n") if line.startswith("Meaning")) == [
        "Meaning: no",
        "Meaning: yes",
    ]
    assert all(prompt.startswith(head) for prompt in prompts), "the same examples before each"


@pytest.mark.parametrize("order", ["before", "after"])
def test_solved_pairs_show_the_reasons_that_answers_are_read_with(recipe, order):
    rows = pairs(0, 24)
    for row in rows[::2]:
        del row["rationale"]  # such pairs are no examples
    write_lines(Path("pairs.jsonl"), rows)
    changes = {"evaluate": {"few_shot": 2, "max_new_tokens": 4}, "matching": {"rationale": order}}
    assert evaluate(load_recipe(Path(save(recipe, **changes)))).keys() == {"base", "fewshot"}
    row = read_jsonl(Path("runs/tiny/eval/fewshot/predictions.jsonl"))[0]
    first, second, _ = row["prompt"].split("\n\n")
    labels = []
    for example in (first, second):
        lines = example.split("Meaning: ")[1].split("\n")
        labels.append(lines[0] if order == "after" else lines[1].removeprefix("Conclusion: "))
        assert ("Reason: " in lines[1]) == (order == "after") and len(lines) == 2
    assert sorted(labels) == ["different", "same"]
    write_lines(Path("pairs.jsonl"), [{k: v for k, v in r.items() if k != "rationale"} for r in rows])
    with pytest.raises(UserInputError, match="too few training records with a rationale for the examples"):
        evaluate(load_recipe(Path(save(recipe, **changes, name="bare"))))


def test_a_folder_that_another_version_wrote_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("matching.json").write_text(
        '{"model": {"path": ""}, "matching": {"labels": {"en": [" no", " yes"]}}}'
    )
    with pytest.raises(UserInputError, match="matching.json: not as this version(.|\n)*fix the file"):
        recipe_of(Path("."))


def test_an_example_behind_the_answer_is_not_read(recipe, monkeypatch):
    """A model without training goes on with an example of its own, which may conclude otherwise."""
    shown = [{"a": "Ann 1", "b": "Bob 1", "label": 0, "rationale": "Ann is not Bob"}]
    monkeypatch.setattr("sftcore.generate.own.decode_batch", lambda *_, **__: [[0]] * 12)
    matching = {"rationale": "before", "examples": shown}
    loaded = load_recipe(Path(save(recipe, matching=matching, evaluate={"batch_size": 12})))
    said = " one name\nConclusion: same\n\nText 1: x\nMeaning: why\nConclusion: different"
    kind = type(AutoTokenizer.from_pretrained(loaded.model.path))
    monkeypatch.setattr(kind, "decode", lambda *_, **__: said)
    assert evaluate(loaded)["base"]["pairs"]["test"]["predicted_same"] == 1


def test_only_a_model_that_we_trained_is_asked_for_its_stop_token(recipe, monkeypatch):
    """Behind solved pairs a text goes on with the next one: a stop token there says nothing of the label."""
    asked = {}

    def note(model, questions, **options):
        asked[Path(model.name_or_path).name] = questions[0].continuations
        return continuation_scores(model, questions, **options)

    monkeypatch.setattr("sftcore.generate.score.continuation_scores", note)
    path = Path(save(recipe, evaluate={"few_shot": 2}))
    train_recipe(load_recipe(path))
    evaluate(load_recipe(path))
    stop = AutoTokenizer.from_pretrained(recipe["model"]["path"]).eos_token_id
    assert len(asked) == 2
    for folder, continuations in asked.items():
        assert [ids[-1] == stop for ids in continuations] == [folder == "model"] * 2
        assert continuations[0] != continuations[1]


def test_a_label_that_begins_another_is_compared_with_its_line_end(recipe):
    loaded = load_recipe(Path(save(recipe, matching={"labels": {"en": ["Ann Bob", "Ann"]}})))
    tokenizer = AutoTokenizer.from_pretrained(loaded.model.path)
    prompter = Prompter(PromptOptions.of(loaded), tokenizer)
    record = next(iter(read_source(loaded.data.train[0], split="train", labels=loaded.matching.labels)))
    ((long, short),) = prompter.label_ids_batch([record], stops=False)
    assert [tokenizer.decode(ids) for ids in (long, short)] == [" Ann Bob\n", " Ann\n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"matching": {"rationale": "after", "examples": [{"a": "x", "b": "y", "label": 0}]}},
            "each of the examples needs a rationale",
        ),
        ({"matching": {"mode": "discriminative", "rationale": "after"}}, "so it has no rationale"),
        ({"matching": {"mode": "encoder"}, "adapter": {"kind": "lora"}}, "trains all weights"),
        ({"matching": {"mode": "discriminative"}, "adapter": {"kind": "qlora"}}, "no 4-bit weights"),
        ({"matching": {"pooling": "mean"}}, "pooling and layers are for mode discriminative"),
        (
            {"matching": {"mode": "discriminative", "layers": 2}, "adapter": {"kind": "lora"}},
            "layers: 2 train all weights",
        ),
        ({"matching": {"rationale": "before", "predict": "likelihood"}}, "set predict: generate"),
        ({"matching": {"rationale": "after", "prompt": "complex", "wording": 1}}, "set wording: 0"),
        ({"matching": {"teacher": {}}}, "a server needs `model`"),
        ({"matching": {"teacher": {"backend": "local", "temperature": 1}}}, "set temperature: 0"),
        ({"select": {"n": 4}}, "select.balance of task matching is label or none"),
    ],
)
def test_combinations_that_can_not_be_honoured_are_refused(recipe, change, message):
    with pytest.raises(UserInputError, match=message):
        load_recipe(Path(save(recipe, **change)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"zh": ["相同", "相同"]}, "zh '相同' can't mean 1: zh '相同' means 0"),
        ({"en": ["Same", "same"]}, "en 'same' can't mean 1: en 'same' means 0"),
        ({"en": ["", ""]}, "en '': a word of one line"),
        ({"en": [" no", "yes "]}, "en ' no': a word .* spaces around it; en 'yes ': a word"),
        ({"en": ["no", "y\nes"]}, "of one line"),
        ({"en": ["1", "0"]}, "en '1' can't mean 0: a file's own '1' means 1"),
        ({"zh": ["yes", "no"], "en": ["no", "yes"]}, "en 'no' can't mean 0: zh 'no' means 1"),
    ],
)
def test_label_words_that_can_not_be_told_apart_are_refused(recipe, labels, message):
    with pytest.raises(UserInputError, match=f"label words .* or read: .*{message}") as caught:
        load_recipe(Path(save(recipe, matching={"labels": labels})))
    assert "recipe.yaml: matching.labels" in str(caught.value) and caught.value.exit_code == 2


def test_label_words_may_be_shared_by_languages_and_bare(recipe):
    for labels in ({"zh": ["no", "yes"], "en": ["no", "yes"]}, {"zh": ["0", "1"], "en": ["not it", "it"]}):
        loaded = load_recipe(Path(save(recipe, matching={"labels": labels})))
        assert {name: list(words) for name, words in loaded.matching.labels} == labels


def write_rows(rows: list[tuple]) -> None:
    text = "sentence1\tsentence2\tlabel\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)
    Path("pairs.tsv").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a b", "b c", 2)] * 5, "unknown_label: 5"),
        ([("a b", "b c", i % 3) for i in range(30)], "unknown_label: 10"),
        ([(i % 2, f"text {i}", f"words {i}") for i in range(9)], "label_as_text: 9"),
        ([(f"text {i}", i % 2, i % 2) for i in range(9)], "a text column holds labels"),
        ([(f"text {i}", "\uff10\uff11"[i % 2], i % 2) for i in range(9)], "label_as_text: 9"),
        ([("", "b", 1)] * 4, "empty_prompt: 4"),
    ],
)
def test_unusable_pairs_are_one_message(recipe, rows, message):
    write_rows([*rows, ("fine", "good", 1)])
    data = {"train": [{"format": "pairs", "path": "pairs.tsv"}]}
    with pytest.raises(UserInputError) as caught:
        prepare(load_recipe(Path(save(recipe, data=data))))
    assert message in str(caught.value) and "dropped rows are listed there" in str(caught.value)


def test_odd_pairs_are_kept_and_noted(recipe):
    odd = [
        ("x" * 10_000, "y", 0),
        ("同一句话", "同一句话", 1),
        ("发票怎么開", "怎么开发票", 1),
        ("１２元", "12元", 1),
    ]
    write_rows(odd)
    data = {"train": [{"format": "pairs", "path": "pairs.tsv"}], "max_reject_fraction": 0.5}
    _, store = prepare(load_recipe(Path(save(recipe, data=data))))
    assert len(store) == 3 and store.manifest["rejected_by_reason"] == {"overlength": 1}
    noted = store.manifest["altered_by_reason"]
    assert [noted[change] for change in ("identical_sides", "mixed_scripts", "full_width")] == [1, 1, 1]
