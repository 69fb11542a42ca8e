"""The model card: what hubs read, nothing of this machine, and code that runs in the folder."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import yaml
from launching import run_cells, write_recipe
from tiny import SUBJECTS, TINY, write_lines
from tiny_tokenizers import CHATML, build_bpe
from transformers import AutoModelForCausalLM, LlamaConfig

from sftcore.model.origin import base_licence, base_name
from sftcore.stages.export import export_run

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> dict:
    """Of a base that was pulled from a hub."""
    base = tmp_path / "bases" / "tiny-1b"
    shutil.copytree(tiny_recipe["model"]["path"], base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-terms\n---\n# Tiny\n")
    (base / "origin.json").write_text('{"hub": "tiny-labs/tiny-1b"}')
    return tiny_recipe | {"model": {"path": str(base), "dtype": "float32"}, "evaluate": {"max_new_tokens": 3}}


def card_of(folder: Path) -> tuple[dict, str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1]), text


def printed_by(folder: Path, monkeypatch) -> str:
    """What the card's code prints, run in the folder."""
    (code,) = CODE.findall(card_of(folder)[1])
    said = io.StringIO()
    with monkeypatch.context() as context, contextlib.redirect_stdout(said):
        context.chdir(folder)
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def check(folder: Path, monkeypatch, *, library: str, task: str) -> str:
    front, text = card_of(folder)
    assert front["base_model"] == "tiny-labs/tiny-1b" and front["tags"][0] == "sftcore"
    assert (front["license"], front["license_name"]) == ("other", "tiny-terms")
    assert (front["library_name"], front["pipeline_tag"]) == (library, task)
    assert str(Path.cwd()) not in text and "/tmp" not in text and "loss of the first and last step" in text
    return printed_by(folder, monkeypatch)


def test_cards_of_models_adapters_and_merged_adapters(recipe, monkeypatch):
    full = write_recipe(recipe, "full", train={"epochs": 1})
    lora = write_recipe(recipe, "lora", train={"epochs": 1}, adapter={"kind": "lora", "r": 4})
    run_cells([full, lora], ranks=1)
    text = "text-generation"
    assert check(Path("runs/full/model"), monkeypatch, library="transformers", task=text).strip()
    beside = check(Path("runs/lora/adapter"), monkeypatch, library="peft", task=text)
    scores = Path("runs/lora/eval/tuned/scores.json")
    scores.parent.mkdir(parents=True)
    scores.write_text('{"n": 4, "correct": 3, "accuracy": 0.75}')
    export_run(Path("runs/lora"), Path("merged"), merge=True)
    assert check(Path("merged"), monkeypatch, library="transformers", task=text) == beside
    export_run(Path("runs/lora"), Path("copy"), merge=False)
    for folder in (Path("merged"), Path("copy")):
        assert "tuned: 3 of 4 held-out items right (75.0%)" in card_of(folder)[1]
    assert card_of(Path("merged"))[0]["base_model_relation"] == "finetune"
    assert card_of(Path("copy"))[0]["base_model_relation"] == "adapter"


def test_cards_of_classifiers(recipe, monkeypatch):
    rows = [
        {"sentence1": f"{n} {i}", "sentence2": f"{n} {i % 2}", "label": i % 2} for i, n in enumerate(SUBJECTS)
    ]
    write_lines(Path("pairs.jsonl"), rows)
    data = {"train": [{"format": "pairs", "path": "pairs.jsonl"}], "test": []}
    changes = {"task": "matching", "data": data, "train": {"epochs": 1}}
    plain = write_recipe(recipe, "plain", **changes, matching={"mode": "discriminative"})
    own = write_recipe(recipe, "own", **changes, matching={"mode": "discriminative", "layers": 2})
    lora = write_recipe(
        recipe, "low", **changes, matching={"mode": "discriminative"}, adapter={"kind": "lora", "r": 4}
    )
    run_cells([plain, own, lora], ranks=1)
    for name, library in (("plain/model", "transformers"), ("low/adapter", "peft")):
        said = check(Path("runs") / name, monkeypatch, library=library, task="text-classification")
        assert said.strip() in ("different", "same")
    front, text = card_of(Path("runs/own/model"))
    assert front["pipeline_tag"] == "text-classification" and "sftcore match . --pairs" in text


def test_the_card_of_a_chat_speaks_through_the_template(recipe, monkeypatch, tmp_path):
    base = tmp_path / "bases" / "tiny-1b"
    tokenizer = build_bpe()
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|endoftext|>"
    tokenizer.save_pretrained(base)
    config = LlamaConfig(**TINY | {"vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "In France."}]
    write_lines(Path("chats.jsonl"), [{"messages": turns}] * 4)
    data = {"train": [{"format": "jsonl", "path": "chats.jsonl"}], "test": []}
    run_cells([write_recipe(recipe, "chat", task="chat", data=data, train={"epochs": 1})], ranks=1)
    check(Path("runs/chat/model"), monkeypatch, library="transformers", task="text-generation")
    (code,) = CODE.findall(card_of(Path("runs/chat/model"))[1])
    assert "apply_chat_template(messages, add_generation_prompt=True" in code


def test_a_local_folder_without_origin_or_licence_is_only_named(tmp_path):
    base = tmp_path / "mine"
    base.mkdir()
    assert base_name(str(base)) == "mine" and base_licence(str(base)) == {}
    (base / "LICENSE.txt").write_text(
        "                 Apache License\n           Version 2.0, January 2004\n"
    )
    assert base_licence(str(base)) == {"license": "apache-2.0"}
    assert base_licence("nobody/nothing") == {}
