"""Validation during training: its loss is exact, changes nothing, stops early, and keeps the best weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, run, run_cells, steps, weights, weights_hash, write_recipe
from transformers import AutoModelForCausalLM

from sftcore.data.prepare import prepare_store
from sftcore.data.splits import with_valid_as_train
from sftcore.data.tokens import load_tokenizer
from sftcore.errors import UserInputError
from sftcore.fsio import read_jsonl
from sftcore.recipe import load_recipe
from sftcore.stages.train import train_recipe
from sftcore.train.checkpoint import checkpoint_folder, read_state
from sftcore.train.validate import is_exhausted

VALID = [{"format": "facts", "path": "test.jsonl"}]


def with_valid(recipe: dict, **changes) -> dict:
    return {**recipe, "data": {**recipe["data"], "valid": VALID, "test": []}, **changes}


def recomputed_loss(path: Path, folder: Path) -> float:
    """Mean cross-entropy of the set's trained tokens, each sample alone, by plain transformers."""
    recipe = load_recipe(path)
    store = prepare_store(with_valid_as_train(recipe), load_tokenizer(recipe.model.path))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for sample in (store[i] for i in range(len(store))):
        with torch.no_grad():
            logits = model(torch.from_numpy(np.asarray(sample.input_ids, np.int64))[None]).logits[0]
        labels = torch.from_numpy(np.asarray(sample.labels, np.int64))
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none"))
        losses[-1] = losses[-1][labels != -100]
    return float(torch.cat(losses).mean())


def test_the_valid_loss_is_exact_with_one_and_two_ranks_and_changes_nothing(tiny_recipe):
    train = {"evaluate_every_steps": 3, "z_loss": 1e-3, "label_smoothing": 0.1}
    recipe = with_valid(tiny_recipe)
    one = write_recipe(recipe, "one", train=train, batch={"capacity": 64})
    two = write_recipe(recipe, "two", train=train, batch={"capacity": 64})
    unwatched = {**train, "evaluate_every_steps": None}
    never = write_recipe(tiny_recipe, "never", train=unwatched, batch={"capacity": 64})
    run_cells([one, never], ranks=1)
    run_cells([two], ranks=2)
    rows, again = (read_jsonl(Path("runs") / name / "valid.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in rows] == [3, 4, 6, 8], "every third step, and at the end of each epoch"
    assert rows[0]["num_samples"] == 8
    for a, b in zip(rows, again, strict=True):
        assert b["valid_loss"] == pytest.approx(a["valid_loss"], rel=1e-5)
    assert rows[-1]["valid_loss"] == pytest.approx(recomputed_loss(one, Path("runs/one/model")), rel=1e-5)
    assert weights_hash("one") == weights_hash("never")


def test_training_stops_after_patience_and_keeps_the_best_weights(tiny_recipe):
    """A rate so high that the valid loss rises; a resumed run ends as the uninterrupted one."""
    train = {"evaluate_every_steps": 1, "patience": 2, "keep": "best", "lr": 0.05, "epochs": 10}
    recipe = with_valid(tiny_recipe)
    path = write_recipe(recipe, "best", train=train)
    run_cells([path], ranks=1)
    losses = [row["valid_loss"] for row in read_jsonl(Path("runs/best/valid.jsonl"))]
    lowest = min(losses)
    assert len(losses) == losses.index(lowest) + 3 == len(steps("best")) < 40
    assert recomputed_loss(path, Path("runs/best/model")) == pytest.approx(lowest, rel=1e-5)
    assert not Path("runs/best/best").exists()


def test_lora_and_qlora_still_learn_after_an_evaluation(tiny_recipe):
    """Evaluation mode changes the layout of 4-bit layers, which must not reach the next step."""
    recipe = with_valid(tiny_recipe)
    names = {"l": "lora", "q": "qlora"}
    often = {"evaluate_every_steps": 1, "epochs": 2}
    paths = [write_recipe(recipe, n, train=often, adapter={"kind": k, "r": 4}) for n, k in names.items()]
    never = [write_recipe(tiny_recipe, f"{n}-never", adapter={"kind": k, "r": 4}) for n, k in names.items()]
    run_cells([*paths, *never], ranks=1)
    for name in names:
        assert weights_hash(name) == weights_hash(f"{name}-never")
        assert all(tensor.isfinite().all() for tensor in weights(name).values())
        losses = [row["valid_loss"] for row in read_jsonl(Path("runs") / name / "valid.jsonl")]
        assert losses[-1] < losses[0]


def test_settings_of_validation_need_data_for_it(tiny_recipe):
    path = write_recipe(tiny_recipe, "none", train={"patience": 2})
    done = run(str(ROOT / ".venv/bin/sftcore"), "train", str(path))
    assert done.returncode == 2 and "train.patience needs held-out samples: give data.valid" in done.stderr


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([], 1, False),
        ([1.0], 1, False),
        ([1.0, 1.0], 1, True),
        ([2.0, 1.0, 3.0], 2, False),
        ([1.0] * 9, None, False),
    ],
)
def test_patience_counts_evaluations_since_the_lowest(losses, patience, expected):
    assert is_exhausted(losses, patience) is expected


def test_lost_evaluations_are_told_and_best_weights_stay(tiny_recipe):
    """A checkpoint knows how many there were; a lower loss that is lost would give its weights away."""
    recipe = with_valid(tiny_recipe, checkpoint={"save_every_steps": 2, "keep": 9})
    path = write_recipe(recipe, "run", train={"evaluate_every_steps": 1, "keep": "best"})
    train_recipe(load_recipe(path))
    folder = Path("runs/run")
    assert read_state(checkpoint_folder(folder, 4)).num_evaluations == 4
    file, rows = folder / "valid.jsonl", (folder / "valid.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(folder / "model", folder / "best")
    shutil.rmtree(folder / "model")
    for content in (None, "", "".join(rows[:1] + rows[2:])):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        with pytest.raises(
            UserInputError, match="(?s)valid.jsonl: evaluations.*are missing.*allowed: 8 or more"
        ):
            train_recipe(load_recipe(path))
        assert (folder / "best").is_dir() and not (folder / "model").exists()
    file.write_text("".join(rows))
    (folder / "best").rename("away")
    with pytest.raises(UserInputError, match="runs/run/best: the weights with the lowest"):
        train_recipe(load_recipe(path))
    Path("away").rename(folder / "best")
    train_recipe(load_recipe(path))
    assert (folder / "model").is_dir()
