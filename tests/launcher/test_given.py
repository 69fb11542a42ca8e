"""A path of another kind than a command takes: one sentence, the right next command, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher_commands import save

from sftcore.errors import UserInputError
from sftcore.launcher.cli import app
from sftcore.launcher.terminal import explained

PAIRS = ("--pairs", "train.jsonl")


def refusal(*arguments: str) -> str:
    """The message of a command that exits with 2 and leaves no file behind."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserInputError) as refused, explained():
        app(list(arguments), standalone_mode=False)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert len(refused.value.problems) == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("report", ()),
        ("match", PAIRS),
        ("generate", ("--prompt", "Hi")),
        ("export", ("--to", "out")),
    ],
)
def test_a_recipe_is_not_the_folder_of_its_run(tiny_recipe, command, more):
    path = save(tiny_recipe)
    said = refusal(command, path, *more)
    what = f"recipe.yaml: this is a recipe; `sftcore {command}` takes the folder of its run\n"
    assert said == f"{what}    do: first sftcore train recipe.yaml, then sftcore {command} runs/tiny"
    Path("elsewhere").mkdir()
    save(tiny_recipe, run="elsewhere")
    assert refusal(command, path, *more).endswith(f"do: sftcore {command} elsewhere")
    Path("study.yaml").write_text("base: recipe.yaml\n")
    assert "this is a study" in (said := refusal(command, "study.yaml", *more))
    assert said.endswith(f"first sftcore study study.yaml, then sftcore {command} runs/study")
    assert "this is a file; " in refusal(command, "train.jsonl", *more)
    assert refusal(command, "nowhere", *more).startswith("nowhere: no such folder\n")
    Path("broken.yaml").write_text("a: [")
    assert "this is a recipe" in refusal(command, "broken.yaml", *more)


@pytest.mark.parametrize("command", ["prepare", "plan", "train", "evaluate", "probe", "inspect"])
def test_a_folder_that_is_no_run_tells_what_is_in_it(tiny_recipe, command):
    assert refusal(command, ".").endswith(
        "do: give a recipe (a YAML file; see recipes/ for some to copy), or the folder of a run"
    )
    Path(save(tiny_recipe)).rename("mine.yml")
    said = refusal(command, ".")
    assert said == ".: not a run folder: no recipe.yaml\n    do: give a recipe in it, such as mine.yml"
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/recipe.yaml").touch()
    assert refusal(command, "runs").endswith("do: give a run in it, such as runs/tiny")


def test_no_held_out_data_is_said_to_be_missing(tiny_recipe):
    data = {"train": tiny_recipe["data"]["train"]}
    said = refusal("evaluate", save(tiny_recipe, data=data))
    assert said.startswith("data.test: is empty: there is nothing to score\n")
    assert said.endswith("    do: name held-out files there, or in data.ood")
