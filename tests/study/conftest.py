"""A small run folder with numbers that can be checked by hand: 4 of 40 right before, 16 after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftcore.evaluate.score import score
from sftcore.fsio import read_json, write_json, write_jsonl
from sftcore.study.report import write_report

EVIL = "<script>alert('x')</script>"
RECIPE = {
    "name": "tiny & small",
    "seed": 17,
    "model": {"path": "/models/smollm2-135m"},
    "adapter": {"kind": "none"},
    "task": "qa",
    "train": {"lr": 1e-5},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeRun:
    """Writes and changes the files of a run folder at `path`."""

    path: Path
    recipe: dict[str, Any]

    def write_recipe(self, changes: dict[str, Any]) -> None:
        text = yaml.safe_dump(self.recipe | changes)
        (self.path / "recipe.yaml").write_text(text, encoding="utf-8")

    def prediction(self, number: int, *, correct: bool, level: int, split: str = "test") -> dict[str, Any]:
        return {
            "id": f"{split}-{number}",
            "prompt": f"Where is {EVIL if number == 0 else f'东京 {number}'}?",
            "prediction": EVIL,
            "answers": ["Oslo", "Kristiania"],
            "correct": correct,
            "level": level,
            "relation": "P17" if number % 2 else "P131",
            "split": split,
        }

    def predictions(self, right: set[int]) -> list[dict[str, Any]]:
        """20 test items on level 1, 20 on level 3, and 4 of split ood that are always wrong."""
        rows = [self.prediction(i, correct=i in right, level=1 if i < 20 else 3) for i in range(40)]
        return rows + [self.prediction(i, correct=False, level=2, split="ood") for i in range(4)]

    def write_evaluation(self, model: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.path / "eval" / model / "predictions.jsonl", rows)
        write_json(self.path / "eval" / model / "scores.json", score(rows))

    def write_training(self) -> None:
        counts = {"lr": 1e-5, "num_tokens": 10, "num_trained_tokens": 2}
        steps = ({"step": i, "loss": 4.0 - i / 2, "elapsed_seconds": i, **counts} for i in range(1, 6))
        write_jsonl(self.path / "metrics.jsonl", steps)
        write_json(self.path / "plan.json", {"totals": {"num_steps": 5, "utilisation": 0.9712}, "steps": []})
        environment = {"torch": "2.11.0", "model_fingerprint": "aa", "train_seconds": 3.5}
        write_json(self.path / "environment.json", environment)

    def write_levels(self) -> None:
        probe = {"templates": 21, "samples": 10, "temperature": 0.7, "max_new_tokens": 32}
        write_json(self.path / "levels.manifest.json", {"model_fingerprint": "aa", **probe})
        fact = {"relation": "P17", "subject": EVIL, "split": "train"}
        rows = [{"id": str(i), "level": i % 5, **fact} for i in range(12)]
        write_jsonl(self.path / "levels.jsonl", [*rows, {"id": "t", "level": 4, "split": "test"}])
        selected = [{"id": "2", "relation": "P17", "level": 2}, {"id": "7", "level": 2}]
        write_jsonl(self.path / "selection.jsonl", selected)

    def report(self) -> dict[str, Any]:
        """report.json, made anew."""
        return dict(read_json(write_report(self.path).json_path))


@pytest.fixture
def fake(tmp_path: Path) -> FakeRun:
    """A whole run: 13 of 40 gained, 1 lost."""
    fake = FakeRun(path=tmp_path / "run", recipe=RECIPE)
    fake.path.mkdir()
    fake.write_recipe({})
    fake.write_evaluation("base", fake.predictions({0, 1, 2, 20}))
    fake.write_evaluation("tuned", fake.predictions({0, 1, 20} | set(range(21, 34))))
    fake.write_training()
    fake.write_levels()
    return fake


@pytest.fixture
def run(fake: FakeRun) -> Path:
    """The folder of `fake`."""
    return fake.path
