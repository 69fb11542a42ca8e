"""`sftcore init` writes recipes that plan; `sftcore recipes` lists what ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import write_lines
from typer.testing import CliRunner

from sftcore.data.sniff import guess_source
from sftcore.errors import UserInputError
from sftcore.launcher.cli import app
from sftcore.launcher.starting import RECIPES
from sftcore.recipe import load_recipe
from sftcore.sources import Source

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
FACT = {"relation": "P36", "subject": "Peru", "answers": ["Lima"]}
FILES = {  # file -> rows, task, what the source says beside its path
    "turns.jsonl": ([{"messages": CHAT}], "chat", {"format": "jsonl"}),
    "dialogs.jsonl": (
        [{"dialog": CHAT, "id": 3}],
        "chat",
        {"format": "jsonl", "columns": {"messages": "dialog"}},
    ),
    "facts.jsonl": ([FACT, FACT | {"subject": "Chile"}], "qa", {"format": "facts"}),
    "alpaca.jsonl": ([{"instruction": "Say", "input": "", "output": "x"}], "qa", {"preset": "alpaca"}),
    "answers.jsonl": (
        [{"question": "1 + 1?", "answer": "2"}],
        "qa",
        {"format": "jsonl", "columns": {"prompt": "question", "completion": "answer"}},
    ),
    "odd.jsonl": (
        [{"prompt": "a", "completion": "b", "history": "c", "length": 7}] * 3,
        "qa",
        {
            "format": "jsonl",
            "columns": {"prompt": "prompt", "completion": "completion", "ignore": ["history"]},
        },
    ),
    "pairs.jsonl": (
        [{"text_a": "x", "text_b": "y", "label": 1}],
        "matching",
        {"format": "pairs", "columns": {"a": "text_a", "b": "text_b", "label": "label"}},
    ),
}


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if code:
        assert isinstance(result.exception, UserInputError)
        return str(result.exception)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_becomes_a_recipe_that_reads_it_whole(
    name, tmp_path, monkeypatch, tiny_model_folder
):
    monkeypatch.chdir(tmp_path)
    rows, task, source = FILES[name]
    write_lines(Path(name), rows)
    said = invoke("init", "--data", name, "--model", str(tiny_model_folder), "--to", "mine.yaml")
    assert f"{len(rows)} of the first {len(rows)} rows" in said and "sftcore plan mine.yaml" in said
    recipe = load_recipe(Path("mine.yaml"))
    assert (recipe.task, recipe.name) == (task, name.removesuffix(".jsonl"))
    assert recipe.data.train == [Source.model_validate({**source, "path": str(Path(name).resolve())})]
    assert all(
        "    # " in line
        for line in Path("mine.yaml").read_text().splitlines()
        if line.startswith(("task", "batch"))
    )


def test_a_table_without_a_header_and_shipped_files_are_known(tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_text("一\t二\t1\n三\t四\t0\n", encoding="utf-8")
    guess = guess_source(table)
    assert (guess.task, guess.num_records) == ("matching", 2)
    named = tmp_path / "P36.train.json"
    named.write_text(
        json.dumps([{"question": f"What is the capital of {x}?", "answers": ["a"]} for x in "XY"])
    )
    assert guess_source(named).source == {"format": "entityquestions"}


def test_a_recipe_elsewhere_names_the_file_that_was_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    for folder in (".", "other"):
        write_lines(Path(folder) / "facts.jsonl", [FACT])
    invoke("init", "--data", "facts.jsonl", "--model", "m", "--to", "other/x.yaml")
    assert load_recipe(Path("other/x.yaml")).data.train[0].path == str(tmp_path / "facts.jsonl")


def test_what_it_writes_plans(tmp_path, monkeypatch, tiny_model_folder):
    monkeypatch.chdir(tmp_path)
    for name, first in (("some answers", 0), ("others", 50)):
        rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(first, first + 20)]
        write_lines(Path(f"{name}.jsonl"), rows)
    files = ("--data", "some answers.jsonl", "--test", "others.jsonl")
    invoke("init", *files, "--model", str(tiny_model_folder))
    planned = json.loads(invoke("plan", "some-answers.yaml", "--set", "batch.capacity=256", "--json"))
    assert planned["totals"]["num_steps"] > 0


def test_wrong_input_is_one_message_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("odd.jsonl"), [{"left": 1, "right": 2}])
    said = invoke("init", "--data", "odd.jsonl", "--model", "m", code=2)
    assert "no row of it could be read" in said and "left, right" in said and "docs/data.md" in said
    write_lines(Path("facts.jsonl"), [FACT])
    assert "as chat" in invoke("init", "chat", "--data", "facts.jsonl", "--model", "m", code=2)
    assert "no such file" in invoke("init", "--data", "none.jsonl", "--model", "m", code=2)
    assert [file.name for file in tmp_path.glob("*.yaml")] == []
    invoke("init", "--data", "facts.jsonl", "--model", "m")
    assert "a file of this name is there" in invoke("init", "--data", "facts.jsonl", "--model", "m", code=2)


FAULTS = {  # file -> what it holds (None: a folder), the reason that is told
    "folder": (None, "this is a folder, not a file"),
    "empty.jsonl": (b"", "the file holds no rows"),
    "zeros.csv": (b"\0" * 5000, "it begins with zeros only"),
    "torn.parquet": (b"PAR1" + bytes(range(256)), "not a Parquet file"),
    "bytes.jsonl": (bytes(range(256)), "bytes.jsonl:1: unreadable_line"),
    "lists.jsonl": (b"[1, 2]\n", "no named fields"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_read_is_told_its_own_reason(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = FAULTS[name]
    Path(name).mkdir() if content is None else Path(name).write_bytes(content)
    write_lines(Path("facts.jsonl"), [FACT])
    for files in (["--data", name], ["--data", "facts.jsonl", "--test", name]):
        said = invoke("init", *files, "--model", "m", code=2)
        assert reason in said or (files[-2] == "--test" and name in said)
    assert list(tmp_path.glob("*.yaml")) == []


@pytest.mark.parametrize(
    "name", ["two\nname: b.jsonl", "n" * 240 + ".jsonl", "it's: #x, {y}.jsonl", "a[1].jsonl"]
)
def test_any_name_of_a_file_gives_a_recipe_that_reads_it(name, tmp_path, monkeypatch, tiny_model_folder):
    monkeypatch.chdir(tmp_path)
    write_lines(Path(name), [FACT])
    invoke("init", "--data", name, "--model", str(tiny_model_folder), "--to", "mine.yaml")
    assert load_recipe(Path("mine.yaml")).data.train[0].path == str(Path(name).resolve())


def test_recipes_are_listed_and_printed():
    listed = invoke("recipes").splitlines()
    assert [line.split()[0] for line in listed] == sorted(file.stem for file in RECIPES.glob("*.yaml"))
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)
    assert invoke("recipes", "qa-60") == (RECIPES / "qa-60.yaml").read_text(encoding="utf-8")
    assert "quickstart" in invoke("recipes", "quikstart", code=2)
