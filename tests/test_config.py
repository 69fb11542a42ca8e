"""Recipes: the contract's names and defaults; every mistake in one message; overrides; paths."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.recipe import DS_CONFIGS, ELSEWHERE, deepspeed_file, dump_recipe, load_recipe, source_files
from sftcore.study.grid import expand, read_study

ROOT = Path(__file__).parent.parent
MINIMAL = {
    "model": {"path": "org/model"},
    "data": {"train": [{"format": "jsonl", "path": "data.jsonl"}]},
    "batch": {"samples_per_step": 8},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")

    def write_(content) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-5}, "learning_rate: unknown key"),
        ({"learning_rate": 1e-5}, "here it is train.lr\n"),
        ({"lr": 1e-5}, "did you mean 'train.lr'?"),
        (
            {"train": {"per_device_train_batch_size": 4}},
            "here it is batch.samples_per_step (of the whole step",
        ),
        ({"train": {"capacity": 4}}, "did you mean 'batch.capacity'?"),
        ({"max_new_tokens": 4}, "did you mean 'probe.max_new_tokens' or 'evaluate.max_new_tokens'?"),
        ({"adapter": {"lora_alpha": 4}}, "here it is adapter.alpha"),
    ],
)
def test_keys_of_other_tools_and_other_sections_are_told(write, change, message):
    with pytest.raises(UserInputError) as refused:
        load_recipe(write(MINIMAL | change))
    assert message in f"{refused.value}\n" and "recipe.yaml: " in str(refused.value)


def test_hints_name_keys_that_exist():
    schema = Recipe.model_json_schema()
    for hint in ELSEWHERE.values():
        section, _, key = hint.split(" ")[0].rstrip(":").partition(".")
        assert section in schema["properties"], hint
        if key:
            name = re.search(r"defs/(\w+)", str(schema["properties"][section]))[1]
            assert key in schema["$defs"][name]["properties"], hint


def test_a_wrong_value_of_the_command_line_is_not_looked_for_in_the_file(write):
    with pytest.raises(UserInputError) as refused:
        load_recipe(write(MINIMAL | {"trian": 1}), ["lora_r=8", "train.epochs=none"])
    said = str(refused.value)
    assert "--set lora_r: unknown key" in said and "--set train.epochs: " in said
    assert "recipe.yaml: trian: unknown key" in said


def test_defaults_are_those_of_the_design(write):
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.seed, recipe.task, recipe.deepspeed, recipe.adapter.kind) == (17, "qa", "zero1", "none")
    assert (recipe.probe.templates, recipe.probe.samples, recipe.probe.temperature) == (21, 10, 0.7)
    assert (recipe.train.lr, recipe.train.scheduler, recipe.train.normalise) == (1e-5, "cosine", "token")
    assert (recipe.batch.capacity, recipe.max_length) == (4096, 4096)
    assert (recipe.checkpoint.save_every_steps, recipe.checkpoint.keep) == (50, 2)
    assert recipe.run_folder == Path("runs/run")


def test_a_dumped_recipe_loads_to_the_same(write, tmp_path):
    recipe = load_recipe(write(MINIMAL), ["train.lr=3e-4", "select={levels: [1, 2], n: 5}"])
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert recipe.train.lr == 3e-4 and recipe.select.levels == [1, 2]


def test_all_mistakes_come_in_one_message(write):
    wrong = MINIMAL | {
        "model": {"path": "./nowhere"},
        "trian": {},
        "train": {"lr": -1, "scheduler": "cosin", "epoch": 2},
        "data": {"train": [{"format": "jsonl", "path": "absent.jsonl"}]},
        "batch": {"samples_per_step": 8, "tokens_per_step": 9},
    }
    with pytest.raises(UserInputError) as caught:
        load_recipe(write(wrong))
    text = str(caught.value)
    for part in (
        "model.path: no such model folder",
        "data.train.0.path: no file matches",
        "trian: unknown key",
        "did you mean 'train'?",
        "train.lr",
        "train.scheduler",
        "did you mean 'epochs'?",
        "exactly one of samples_per_step and tokens_per_step",
    ):
        assert part in text, part
    assert len(caught.value.problems) == 7
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "is a YAML mapping"),
        ("seed: 1\nseed: 2\n", "'seed' given twice"),
        (
            {**MINIMAL, "batch": {"tokens_per_step": 100, "capacity": 64}},
            r"tokens_per_step \(100\).*capacity \(64\)",
        ),
        (
            {**MINIMAL, "data": {**MINIMAL["data"], "max_length": 5000}},
            r"max_length \(5000\) is over.*\(4096\)",
        ),
        ({**MINIMAL, "deepspeed": "zero9"}, "(?s)no such DeepSpeed configuration.*zero1"),
        ({k: v for k, v in MINIMAL.items() if k != "model"}, "model: required key is missing"),
    ],
)
def test_wrong_recipes_are_refused(write, content, message):
    with pytest.raises(UserInputError, match=message):
        load_recipe(write(content))


def test_a_recipe_that_is_not_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserInputError, match="must be UTF-8"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(UserInputError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "an override is written a.b=value"),
        ("train.lr=[", "not a YAML value"),
        ("data.train.7.limit=1", "no such place in the recipe: '7'"),
        ("data.train.x=1", "no such list position: 'x'"),
        ("train.lrr=1", "did you mean 'lr'"),
    ],
)
def test_wrong_overrides_are_refused(write, override, message):
    with pytest.raises(UserInputError, match=message):
        load_recipe(write(MINIMAL), [override])


def test_overrides_reach_lists_and_new_sections(write):
    recipe = load_recipe(write(MINIMAL), ["data.train.0.limit=3", "checkpoint.keep=5", "name=other"])
    assert recipe.data.train[0].limit == 3 and recipe.checkpoint.keep == 5 and recipe.name == "other"
    (recipe_path := write(MINIMAL)).with_name("more.jsonl").write_text("{}\n")
    replaced = load_recipe(recipe_path, ['data.train.0={"format": "jsonl", "path": "more.jsonl"}'])
    assert replaced.data.train[0].path.endswith("more.jsonl")


def test_paths_are_relative_to_the_recipe_then_to_here(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "near.jsonl").write_text("{}\n")
    (tmp_path / "here.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    sources = [{"format": "jsonl", "path": p} for p in ("near.jsonl", "here.jsonl", "assets:facts/*.jsonl")]
    (tmp_path / "recipes" / "r.yaml").write_text(yaml.safe_dump(MINIMAL | {"data": {"train": sources}}))
    recipe = load_recipe(Path("recipes/r.yaml"))
    near, here, shipped = (source_files(s) for s in recipe.data.train)
    assert near == [tmp_path / "recipes" / "near.jsonl"] and here == [tmp_path / "here.jsonl"]
    assert [f.name for f in shipped] == ["ood.jsonl", "test.jsonl", "train.jsonl"]
    assert deepspeed_file(recipe) == DS_CONFIGS / "zero1.json"


def test_globs_go_through_folders_and_names_with_brackets_are_names(tmp_path):
    folder = tmp_path / "[1]" / "deep"
    folder.mkdir(parents=True)
    for file in (folder / "a.jsonl", folder / "b[2].jsonl"):
        file.write_text("{}\n")
    sources = [{"format": "jsonl", "path": p} for p in ("**/*.jsonl", "deep/b[2].jsonl")]
    recipe_path = tmp_path / "[1]" / "r.yaml"
    recipe_path.write_text(yaml.safe_dump(MINIMAL | {"data": {"train": sources}}))
    both, one = (source_files(s) for s in load_recipe(recipe_path).data.train)
    assert [file.name for file in both] == ["a.jsonl", "b[2].jsonl"] and one == [folder / "b[2].jsonl"]


def test_an_adapter_to_go_on_from_has_to_be_there(write):
    with pytest.raises(UserInputError, match=r"train.init_adapter: no adapter there\n.*runs/nothing"):
        load_recipe(write(MINIMAL), ["adapter.kind=lora", "train.init_adapter=runs/nothing"])


def test_each_draw_trains_with_a_seed_of_its_own(write):
    seeds = [load_recipe(write(MINIMAL), [f"select.draw={draw}"]).training_seed for draw in range(3)]
    assert seeds[0] == load_recipe(write(MINIMAL)).training_seed == 17 and len(set(seeds)) == 3


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_recipes_and_studies_are_valid(file):
    """All keys are valid; files that the user has to bring may be absent."""
    is_study = "base" in yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        assert expand(read_study(file), ROOT / "runs") if is_study else load_recipe(file)
    except UserInputError as error:
        assert all("no file matches" in p.what or "no such model folder" in p.what for p in error.problems), (
            error
        )


def test_schema_describes_every_key():
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    assert set(schema["required"]) == {"model", "data", "batch"}
    assert sections["TrainSettings"]["properties"]["lr"]["description"]
    assert json.dumps(schema)


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("none", None, 1e-5),
        ("lora", None, 2e-4),
        ("qlora", "auto", 2e-4),
        ("lora", "1e-5", 1e-5),
        ("none", "auto", 1e-5),
    ],
)
def test_the_learning_rate_follows_the_adapter_unless_it_is_said(write, kind, said, expected):
    """... and stands in the resolved recipe as a number."""
    recipe = load_recipe(write(MINIMAL), [f"adapter.kind={kind}", *([f"train.lr={said}"] if said else [])])
    assert recipe.train.lr == recipe.train.peak_lr == expected
    assert recipe.says_lr is (said == "1e-5")
    again = Recipe.model_validate(yaml.safe_load(dump_recipe(recipe)))
    assert again.train.lr == expected and again.says_lr


def test_a_grid_over_adapters_gives_each_its_rate(write):
    rates = {
        kind: load_recipe(write(MINIMAL), [f"adapter.kind={kind}"]).train.lr
        for kind in ("none", "lora", "qlora")
    }
    assert rates == {"none": 1e-5, "lora": 2e-4, "qlora": 2e-4}
