"""`sftcore generate` says what evaluation scores, in the form of training; the page on results loads one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launcher_commands import save, sftcore
from tiny import write_lines

from sftcore.errors import UserInputError
from sftcore.fsio import read_jsonl
from sftcore.recipe import dump_recipe, load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.generate import Settings, generate_rows, generate_text
from sftcore.stages.train import train_recipe

PAGE = (Path(__file__).parent.parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
SHORT = Settings(max_new_tokens=4)


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def trained(tiny_recipe):
    """A run on facts with questions of their own."""
    for name in ("train", "test"):
        rows = read_jsonl(Path(f"{name}.jsonl"))
        write_lines(Path(f"{name}.jsonl"), [r | {"question": f"Where is {r['subject']}?"} for r in rows])
    recipe = load_recipe(Path(save(tiny_recipe, adapter={"kind": "lora", "r": 2})))
    train_recipe(recipe)
    return recipe


def test_a_run_says_what_was_scored_and_plain_peft_loads_it(trained):
    evaluate(trained)
    rows = read_jsonl(Path("runs/tiny/eval/tuned/predictions.jsonl"))
    questions = [row["question"] for row in read_jsonl(Path("test.jsonl"))]
    write_lines(Path("asked.jsonl"), [{"id": i, "question": q} for i, q in enumerate(questions)])
    said = generate_rows(Path("runs/tiny"), Path("asked.jsonl"), SHORT)
    assert [row["generated"] for row in said] == [row["prediction"] for row in rows] and len(said) == 8
    assert list(said[0]) == ["id", "question", "generated"]
    assert generate_text(Path("runs/tiny/adapter"), questions[3], SHORT) == rows[3]["prediction"]
    assert (
        generate_text(Path("runs/tiny"), rows[3]["prompt"], Settings(max_new_tokens=4, verbatim=True))
        == (rows[3]["prediction"])
    )
    exec(snippets()[1].replace("NAME", "tiny"), found := {})
    assert type(found["model"]).__name__.startswith("PeftModel")


def test_a_model_folder_says_what_transformers_says(tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/NAME").mkdir(parents=True)
    Path("runs/NAME/model").symlink_to(tiny_model_folder)
    exec(snippets()[0], {})
    printed = capsys.readouterr().out
    asked = "Question: Who was born in Rome?\nAnswer:"
    said = generate_text(Path("runs/NAME/model"), asked, Settings(max_new_tokens=16))
    assert printed == f"{asked}{said}\n"


def test_draws_depend_on_the_seed_alone(tiny_model_folder):
    def draw(seed):
        return generate_text(
            tiny_model_folder, "Rome", Settings(max_new_tokens=8, temperature=2.0, seed=seed)
        )

    assert draw(1) == draw(1) and len({draw(seed) for seed in range(4)}) > 1


def test_the_command_prints_text_or_json_lines(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = sftcore("generate", str(tiny_model_folder), "--prompt", "Rome", "--max-new-tokens", "3")
    assert one.returncode == 0, one.stderr
    write_lines(Path("a.jsonl"), [{"prompt": "Rome", "id": 5}])
    many = sftcore("generate", str(tiny_model_folder), "--file", "a.jsonl", "--max-new-tokens", "3")
    row = {"prompt": "Rome", "id": 5, "generated": one.stdout.removesuffix("\n")}
    assert json.loads(many.stdout) == row


def test_wrong_input_is_named(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absent = sftcore("generate", "runs/absent", "--prompt", "x")
    assert absent.returncode == 2 and "runs/absent: no such folder" in absent.stderr
    both = sftcore("generate", str(tiny_model_folder), "--prompt", "x", "--file", "y")
    assert both.returncode == 2 and "exactly one of --prompt and --file" in both.stderr
    bad = [{"text": "x"}, {"prompt": 7}, {"messages": [{"role": "bot", "content": "x"}]}, {"messages": []}]
    write_lines(Path("bad.jsonl"), [{"prompt": "fine"}, *bad])
    with pytest.raises(UserInputError) as caught:
        generate_rows(tiny_model_folder, Path("bad.jsonl"), SHORT)
    assert [problem.where for problem in caught.value.problems] == [f"bad.jsonl:{i}" for i in (2, 3, 4, 5)]
    assert "role 'bot' is none of" in str(caught.value) and "no 'prompt'" in str(caught.value)
    Path("empty.jsonl").touch()
    for file, message in (("empty.jsonl", "holds no rows"), ("none.jsonl", "no such file")):
        with pytest.raises(UserInputError, match=message):
            generate_rows(tiny_model_folder, Path(file), SHORT)
    write_lines(Path("chat.jsonl"), [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UserInputError, match="no chat template"):
        generate_rows(tiny_model_folder, Path("chat.jsonl"), SHORT)
    with pytest.raises(UserInputError, match="a prompt without tokens"):
        generate_text(tiny_model_folder, "", SHORT)


def test_a_run_without_a_result_and_one_for_matching_are_refused(tiny_recipe, tiny_model_folder):
    run = Path("runs/tiny")
    run.mkdir(parents=True)
    recipe = load_recipe(Path(save(tiny_recipe)))
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(UserInputError, match="no result yet"):
        generate_text(run, "x", SHORT)
    (run / "model").symlink_to(tiny_model_folder)
    (run / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"task": "matching"})))
    with pytest.raises(UserInputError, match="a model for text matching(.|\n)*sftcore match"):
        generate_text(run, "x", SHORT)
