"""DeepSpeed files are literal, checked key by key, and completed by the recipe alone."""

from __future__ import annotations

import json

import pytest

from sftcore.config import Recipe
from sftcore.errors import UserInputError
from sftcore.recipe import DS_CONFIGS
from sftcore.train.ds_config import complete_ds_config, read_ds_config, zero_stage

FILES = sorted(DS_CONFIGS.glob("*.json"))


def recipe(dtype: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "x", "dtype": dtype},
            "data": {"train": [{"format": "jsonl", "path": "x"}]},
            "batch": {"samples_per_step": 1},
            "train": {"max_grad_norm": 0.5},
        }
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_files_are_valid_and_hold_nothing_that_the_recipe_owns(file):
    config = read_ds_config(file)
    assert "auto" not in json.dumps(config)
    assert zero_stage(config) == int(file.stem.removeprefix("zero").replace("pp", "3")[0])


def test_all_stages_are_shipped():
    assert {zero_stage(read_ds_config(f)) for f in FILES} == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_recipe_decides_precision_clipping_and_accumulation(stage, dtype):
    complete = complete_ds_config({"zero_optimization": {"stage": stage}}, recipe(dtype))
    assert complete["managed_gradient_accumulation"] is False
    assert complete["gradient_clipping"] == (0.5 if stage else 0.0)
    accumulates = dtype == "bfloat16" and stage > 0
    assert ("bf16" in complete) == accumulates
    assert complete.get("data_types") == ({"grad_accum_dtype": "fp32"} if accumulates else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
        ({"gradient_clipping": 1.0}, "use train.max_grad_norm"),
        ({"bf16": {}, "train_batch_size": 8}, "(?s)use model.dtype.*use batch"),
        ([1], "is a JSON object"),
        ({"zero_optimization": {"stage": float("inf")}}, "(?s)no ZeRO stage.*inf"),
        ({"zero_optimization": {"stage": True}}, "no ZeRO stage"),
        ({"zero_optimization": {"stage": 4}}, "(?s)no ZeRO stage.*0, 1, 2, 3"),
        ({"zero_optimization": 3.5}, "no ZeRO stage"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserInputError, match=message):
        read_ds_config(path)


@pytest.mark.parametrize("text", ["{stage: 1}", "[" * 100_000, f'{{"x": {"9" * 5000}}}', ""])
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserInputError, match="can't read as JSON"):
        read_ds_config(tmp_path / "ds.json")
