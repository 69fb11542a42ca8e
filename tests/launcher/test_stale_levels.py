"""Levels and scores belong to their inputs: after an edit of data, aliases or model they are made again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import SUBJECTS, write_lines

from sftcore.config import Recipe, SelectSettings
from sftcore.errors import UserInputError
from sftcore.fsio import read_json, read_jsonl, write_json
from sftcore.knowledge.containment import AliasRow, AliasTable
from sftcore.recipe import load_recipe
from sftcore.stages.evaluate import evaluate
from sftcore.stages.prepare import probe
from sftcore.stages.prepare import select_by_level as select
from sftcore.stages.whole_run import _files_identity, _probe_once, is_finished, shared_name

LEVELS = Path("runs/tiny/levels.jsonl")
KNOWN = 4


def facts(names, relation="P19") -> list[dict]:
    """Rows without ids, whose ids are their places."""
    return [{"relation": relation, "subject": name, "answers": ["Rome"]} for name in names]


@pytest.fixture
def recipe(tiny_recipe) -> Recipe:
    """Train, test and out-of-domain facts in files of the same name: the same ids in each split."""
    data = {}
    for number, split in enumerate(("train", "test", "ood")):
        Path(split).mkdir()
        write_lines(Path(split, "facts.jsonl"), facts(SUBJECTS[4 * number : 4 * number + 4]))
        data[split] = [{"format": "facts", "path": f"{split}/facts.jsonl"}]
    select = {"levels": [KNOWN], "n": 2, "balance": "none"}
    Path("recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"data": data, "select": select}))
    return load_recipe(Path("recipe.yaml"))


def set_levels(wanted: dict[tuple[str, int], int]) -> None:
    """Write levels of 0 to 4 over those measured: by split and place, 0 if not named."""
    rows = read_jsonl(LEVELS)
    for row in rows:
        level = wanted.get((row["split"], int(row["id"].rpartition(":")[2])), 0)
        row |= {"hits": level, "trials": 4, "recall": level / 4, "level": level}
    write_lines(LEVELS, rows)


def insert_on_top(split: str) -> None:
    path = Path(split, "facts.jsonl")
    path.write_text(json.dumps(facts(["Zoe"])[0]) + "\n" + path.read_text())


def test_facts_drawn_are_told_by_level_and_a_level_without_any_is_warned_of(recipe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sftcore"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sftcore")
    probe(recipe)
    set_levels({("train", 1): KNOWN, ("train", 3): KNOWN})
    wanted = {"levels": [0, 3, KNOWN], "n": 4, "balance": "relation"}
    select(recipe.model_copy(update={"select": SelectSettings.model_validate(wanted)}))
    told = [(r.levelname, r.getMessage()) for r in caplog.records if "select" in r.getMessage()]
    assert told == [
        ("INFO", "select: 4 facts (level 0: 2, level 3: 0, level 4: 2)"),
        ("WARNING", "select.levels names level 3, of which no fact was drawn"),
    ]


def test_levels_of_an_edited_file_are_not_selected_from(recipe):
    probe(recipe)
    set_levels({("train", 1): KNOWN, ("train", 3): KNOWN})
    assert {level.subject for level in select(recipe)} == {SUBJECTS[0], SUBJECTS[2]}
    insert_on_top("train")
    with pytest.raises(UserInputError, match="4 of 4 memory levels belong to facts that the data has no"):
        select(recipe)
    probe(recipe)
    set_levels({("train", 2): KNOWN, ("train", 4): KNOWN})
    assert {level.subject for level in select(recipe)} == {SUBJECTS[0], SUBJECTS[2]}, "probed again"


def test_items_of_an_edited_file_are_not_reported_by_level(recipe):
    probe(recipe)
    insert_on_top("train")  # is of no concern here
    assert "test" in evaluate(recipe)["base"]["splits"]
    insert_on_top("ood")
    with pytest.raises(UserInputError, match="got: ood fact 'facts:1' is P19, Zoe: Rome"):
        evaluate(recipe)


def test_items_with_the_same_id_have_the_levels_of_their_own_splits(recipe):
    probe(recipe)
    ids = [row["id"] for row in read_jsonl(LEVELS)]
    assert ids == [f"facts:{i}" for i in range(1, 5)] * 3
    set_levels({("test", 1): 4, ("test", 2): 3, ("ood", 1): 1})
    evaluate(recipe)
    rows = read_jsonl(Path("runs/tiny/eval/base/predictions.jsonl"))
    found = [(row["split"], row["level"]) for row in rows]
    assert found == [("test", n) for n in (4, 3, 0, 0)] + [("ood", n) for n in (1, 0, 0, 0)]


def test_items_without_a_level_are_counted(recipe, caplog):
    probe(recipe)
    with open("test/facts.jsonl", "a") as handle:
        handle.write(json.dumps(facts(["Zoe"])[0]) + "\n")
    evaluate(recipe)
    assert "1 of 9 items have no memory level" in caplog.text
    rows = read_jsonl(Path("runs/tiny/eval/base/predictions.jsonl"))
    assert ["level" in row for row in rows] == [True] * 4 + [False] + [True] * 4


@pytest.mark.parametrize("shared", [None, Path("shared")])
def test_a_whole_run_probes_again_what_was_edited(recipe, shared):
    _probe_once(recipe, shared)
    before = LEVELS.read_bytes()
    _probe_once(recipe, shared)
    assert LEVELS.read_bytes() == before
    insert_on_top("train")
    _probe_once(recipe, shared)
    rows = read_jsonl(LEVELS)
    assert [row["subject"] for row in rows if row["split"] == "train"] == ["Zoe", *SUBJECTS[:4]]
    assert len(select_any(recipe)) == 5
    folders = list(Path("shared").glob("levels-*/levels.manifest.json")) if shared else []
    assert [read_json(file)["num_facts"] for file in folders].count(13) == (1 if shared else 0)


def select_any(recipe: Recipe) -> list:
    """All training facts, of whatever level."""
    every = recipe.select.model_copy(update={"levels": [0, 1, 2, 3, 4], "n": "all"})
    return select(recipe.model_copy(update={"select": every}))


def edit_aliases(monkeypatch) -> None:
    """As if aliases.tsv had one row more."""
    table = AliasTable.load()
    row = AliasRow(names=("Zoeville", "Zoe City"), near_misses=())
    longer = AliasTable(rows={**table.rows, "zoeville": row, "zoe city": row})
    monkeypatch.setattr(AliasTable, "load", classmethod(lambda cls: longer))


@pytest.mark.parametrize("change", ["aliases", "code"])
def test_levels_and_scores_of_other_aliases_or_code_are_not_found_again(recipe, caplog, monkeypatch, change):
    caplog.set_level("INFO")

    def both() -> tuple[int, int]:
        caplog.clear()
        probe(recipe)
        evaluate(recipe)
        return caplog.text.count("memory levels are already in"), caplog.text.count("already evaluated in")

    assert both() == (0, 0) and both() == (1, 1)
    names = shared_name("levels", recipe), shared_name("base", recipe)
    if change == "aliases":
        edit_aliases(monkeypatch)
    else:
        monkeypatch.setattr("sftcore.knowledge.probe.CODE_VERSION", 0)
        monkeypatch.setattr("sftcore.stages.evaluate.CODE_VERSION", 0)
        monkeypatch.setattr("sftcore.knowledge.levels.CODE_VERSION", 0)
    assert both() == (0, 0) and both() == (1, 1)
    now = shared_name("levels", recipe), shared_name("base", recipe)
    assert not set(names) & set(now), "runs of a study don't share them either"


def test_a_model_called_base_does_not_pass_for_the_base_model(recipe):
    import torch
    from transformers import AutoModelForCausalLM

    other = Path("other/base")
    shutil.copytree(recipe.model.path, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(other)
    evaluate(recipe)
    kept = Path("runs/tiny/eval/base/predictions.jsonl").read_bytes()
    assert set(evaluate(recipe, model=other)) == {"model-base"}
    assert Path("runs/tiny/eval/base/predictions.jsonl").read_bytes() == kept
    assert Path("runs/tiny/eval/model-base/predictions.jsonl").read_bytes() != kept


def test_a_finished_run_belongs_to_its_tokenizer_too(recipe, tiny_model_folder):
    folder = Path("model")
    shutil.copytree(tiny_model_folder, folder)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "model"})})
    finished = {"recipe": recipe.model_dump(mode="json"), **_files_identity(recipe)}
    path = recipe.run_folder / "finished.json"
    write_json(path, finished)
    assert is_finished(recipe)
    with open(folder / "tokenizer.json", "a") as handle:
        handle.write("\n")
    assert not is_finished(recipe)
    write_json(path, {key: finished[key] for key in ("recipe", "files")})
    assert is_finished(recipe), "as a version wrote it that looked at weights and data only"
