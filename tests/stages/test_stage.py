"""The one table of stages: its functions exist, and what was listed apart before follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftcore.errors import UserInputError
from sftcore.launcher.slurm import Resources, recipe_jobs
from sftcore.recipe import load_recipe
from sftcore.runs.claim import claim
from sftcore.stages import stage as table
from sftcore.stages.stage import ROWS, STAGES, Named, Stage, begun, command_of, commands, maker_of, wanted
from sftcore.stages.whole_run import shared_name


def keys_of(recipe: dict, before: str = "") -> list[str]:
    """Dotted keys of all leaves."""
    leaves = [keys_of(v, f"{k}.") if isinstance(v, dict) else [k] for k, v in recipe.items()]
    return [before + key for keys in leaves for key in keys]


def test_each_row_names_functions_that_exist():
    named = [function for row in ROWS for function in (row.run, row.share) if isinstance(function, Named)]
    assert len(named) == 9 and all(callable(function.resolve()) for function in named)


def test_each_stage_is_done_by_a_command_of_the_program():
    from sftcore.launcher.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(commands()) <= names and len(commands()) == 5
    assert {command_of(stage) for stage in ROWS} == {"probe", "train", "evaluate", "report"}


def test_a_recipe_asks_for_some_of_them(tiny_recipe):
    from launcher_commands import save

    whole = load_recipe(Path(save(tiny_recipe)))
    assert [stage.name for stage in wanted(whole)] == ["prepare", "train", "evaluate", "report"]
    selecting = load_recipe(Path(save(tiny_recipe)), ["select.n=3", "data.test=[]"])
    assert [stage.name for stage in wanted(selecting)] == ["probe", "select", "prepare", "train", "report"]


def test_every_key_of_a_recipe_is_bound_by_weights_unless_it_changes_none(tiny_recipe):
    from launcher_commands import save

    keys = keys_of(load_recipe(Path(save(tiny_recipe))).model_dump(mode="json"))
    free = {key for key in keys if not STAGES["train"].refuses(key, is_done=False)}
    sections = {key.partition(".")[0] for key in free}
    assert sections == {"run", "tracking", "checkpoint", "train", "matching", "evaluate"}
    assert {key for key in free if key.startswith(("train.", "matching."))} == {
        "train.hang_seconds",
        "matching.teacher",
    }
    now_free = {key for key in keys if not STAGES["train"].refuses(key, is_done=True)} - free
    assert now_free == {"data.test", "data.ood"}
    assert STAGES["train"].refuses("a_section_of_tomorrow.x", is_done=True)


def test_the_names_of_what_runs_share_are_those_of_before():
    assert STAGES["probe"].sections == ["data", "probe", "seed", "model"]
    expected = ["data", "probe", "seed", "model", "task", "matching", "evaluate", "batch"]
    assert STAGES["evaluate"].sections == expected


def test_files_name_their_command():
    files = ("plan.json", "metrics.jsonl", "model/config.json", "eval/base/scores.json", "report.html")
    assert [maker_of(file) for file in files] == ["train", "train", "train", "evaluate", "report"]


def test_a_toy_stage_is_one_row(tiny_recipe, monkeypatch):
    """It is claimed, submitted, shared and reported with no other list changed."""
    from launcher_commands import save

    toy = Stage(
        name="toy",
        run=lambda recipe: "done",
        share=lambda recipe, share: "a part",
        keys=("evaluate.max_new_tokens",),
        files=("toy/*",),
        common=("toys",),
    )
    monkeypatch.setattr(table, "STAGES", STAGES)
    monkeypatch.setitem(STAGES, "toy", toy)
    path = Path(save(tiny_recipe))
    recipe = load_recipe(path, [f"run={Path.cwd() / 'runs/tiny'}"])
    run = recipe.run_folder
    claim(run, recipe)
    assert begun(run) == []
    (run / "toy").mkdir()
    (run / "toy/part").touch()
    assert begun(run) == [toy] and maker_of("toy/part") == "toy"
    other = load_recipe(path, [f"run={run}", "evaluate.max_new_tokens=5"])
    with pytest.raises(UserInputError, match=r"another evaluate.max_new_tokens"):
        claim(run, other)
    claim(run, load_recipe(path, [f"run={run}", "train.lr=0.5"]))
    jobs = [job.name for job in recipe_jobs(recipe, Resources(options={}), num_shards=2)]
    assert jobs[-2:] == ["toy", "toy-merge"] and "prepare-merge" in jobs
    assert shared_name("toys", recipe) != shared_name("toys", other)
