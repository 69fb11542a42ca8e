"""docs/extending.md: its files are short, do what it says, and need nothing that it does not name."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import typer
import yaml
from tiny_tokenizers import build_bpe
from typer.testing import CliRunner

from sftcore.config import Recipe
from sftcore.data.filters import FILTERS
from sftcore.data.ledger import Ledger, Reason
from sftcore.data.prepare import load_records, prepare_store
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.errors import UserInputError
from sftcore.fsio import read_jsonl
from sftcore.knowledge.containment import AliasTable
from sftcore.launcher.job_commands import stage_command
from sftcore.launcher.options import spread
from sftcore.launcher.slurm import Resources, recipe_jobs
from sftcore.objectives import OBJECTIVES
from sftcore.recipe import load_recipe
from sftcore.runs.claim import claim
from sftcore.stages.stage import STAGES, Named, Stage
from sftcore.stages.train import train_recipe
from sftcore.tasks import TASKS
from sftcore.tasks.task import Task
from sftcore.train import observers
from sftcore.train.rates import RATES

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(sftcore/[\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, re.S))
MOST_LINES = 40


@pytest.fixture
def module_of(tmp_path):
    """Imports a file of the page."""

    def build(name: str):
        path = tmp_path / Path(name).name
        path.write_text(FILES[name], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return build


def recipe_of(rows: list[dict], folder: Path, **values) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    data = {"train": [{"format": "jsonl", "path": str(path)}]} | values.pop("data", {})
    return Recipe.model_validate(
        {"model": {"path": "m"}, "data": data, "batch": {"samples_per_step": 2}} | values
    )


def test_each_file_of_the_page_is_short():
    assert len(FILES) >= 4
    for name, text in FILES.items():
        assert len(text.splitlines()) < MOST_LINES, name


def test_a_task_of_ones_own_reads_trains_and_grades(module_of, monkeypatch, tmp_path):
    sums = module_of("sftcore/tasks/sums.py")
    missing = [name for name in dir(Task) if not name.startswith("_") and not hasattr(sums, name)]
    assert missing == []
    with pytest.raises(ValueError, match="one of qa, matching, chat"):
        recipe_of([], tmp_path, task="sums")
    monkeypatch.setitem(TASKS, "sums", sums)
    recipe = recipe_of(
        [{"prompt": f"{i} + 2 =", "completion": f" {i + 2}"} for i in range(9)], tmp_path, task="sums"
    )
    store = prepare_store(recipe, build_bpe(), cache_root=tmp_path / "stores")
    assert len(store) == 9 and all(store.num_trained)
    record = load_records(recipe, "train", Ledger())[3]
    prompter = Prompter(PromptOptions.of(recipe), build_bpe())
    grades = [
        record.content.graded(text, None, form=prompter.form, aliases=AliasTable.load())["correct"]
        for text in (" 5 apples", "it is 5, not 6", "6, not 5", "five")
    ]
    assert grades == [True, True, False, False]


def test_a_filter_of_ones_own_drops_rows_of_stores_and_of_records(module_of, monkeypatch, tmp_path):
    crowds = module_of("sftcore/data/filters/crowd.py").crowds
    monkeypatch.setitem(FILTERS, Reason.CONTRADICTORY_LABEL, crowds)  # in the place of one
    asked = ["a", "b", "b", "b", "c", "c", "C", "c "]  # 1, 3 and 4 times
    recipe = recipe_of([{"prompt": q, "completion": str(i)} for i, q in enumerate(asked)], tmp_path)
    store = prepare_store(recipe, build_bpe(), cache_root=tmp_path / "stores")
    kept = load_records(recipe, "train", Ledger())
    assert store.ids == [record.id for record in kept] == ["rows:1", "rows:2", "rows:3", "rows:4"]
    assert store.manifest["rejected_by_reason"] == {"contradictory_label": 4}


def test_an_objective_a_rate_and_an_observer_of_ones_own_are_in_a_run(
    module_of, monkeypatch, tiny_recipe, caplog
):
    """Eight steps: no dropout in the first four."""
    module = module_of("sftcore/objectives/dropstage.py")
    monkeypatch.setitem(OBJECTIVES, "dropstage", module.Dropstage)
    monkeypatch.setitem(RATES, "dropout", module.dropout)
    slowest = module_of("sftcore/train/slowest.py").Slowest()
    monkeypatch.setattr(observers, "Profiler", lambda folder: slowest)  # in the place of one
    for name, objective in (("with", "dropstage"), ("without", "auto")):
        recipe = tiny_recipe | {"name": name, "objective": {"name": objective}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        with caplog.at_level("INFO"):
            train_recipe(
                load_recipe(Path(f"{name}.yaml")), debug=observers.DebugOptions(profile=name == "with")
            )
    rows, plain = (read_jsonl(Path("runs") / name / "metrics.jsonl") for name in ("with", "without"))
    assert [row["dropout"] for row in rows] == [0.0] * 4 + [0.3] * 4
    assert [row["num_targets"] for row in rows] == [row["num_trained_tokens"] for row in plain]
    same = [row["loss"] == other["loss"] for row, other in zip(rows, plain, strict=True)]
    assert same == [True] * 4 + [False] * 4
    assert slowest.seconds > 0 and "is the slowest so far" in caplog.text


def test_a_stage_of_ones_own_is_a_command_a_job_and_an_owner_of_its_files(
    module_of, monkeypatch, tiny_recipe
):
    module = module_of("sftcore/stages/longest.py")
    monkeypatch.setitem(sys.modules, "sftcore.stages.longest", module)
    row = eval(re.search(r"```python\n(Stage\(.*?)```", PAGE, re.S)[1], {"Stage": Stage, "Named": Named})
    monkeypatch.setitem(STAGES, "longest", row)
    app = typer.Typer()
    app.command()(spread(stage_command(row)))
    path = Path("tiny.yaml")
    path.write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    said = CliRunner().invoke(app, [str(path)])
    listed = json.loads(Path("runs/tiny/longest.json").read_text())
    assert said.exit_code == 0 and str(listed) in said.output and len(listed) == 3
    recipe = load_recipe(path)
    assert set(listed) <= {record.id for record in load_records(recipe, "train", Ledger())}
    assert [job.name for job in recipe_jobs(recipe, Resources(options={}), num_shards=2)][-1] == "longest"
    with pytest.raises(UserInputError, match="another data.template"):
        claim(recipe.run_folder, load_recipe(path, ["data.template=qa-instruct"]))
    claim(recipe.run_folder, load_recipe(path, ["train.epochs=7"]))
