"""What is written while training goes on changes nothing of the model that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ROOT, run_cells, steps, write_recipe
from test_validation import with_valid
from tiny import SUBJECTS, write_lines

from sftcore.fsio import read_jsonl

WATCHED = str(ROOT / "tests" / "train" / "watched_cells.py")
KINDS = {"full": {"kind": "none"}, "lora": {"kind": "lora", "r": 4}, "qlora": {"kind": "qlora", "r": 4}}
BEST = {"evaluate_every_steps": 1, "keep": "best", "lr": 2e-3}


def watched(name: str, rank: int = 0) -> list[dict]:
    return read_jsonl(Path("runs") / name / f"watched-{rank}.jsonl")


def numbers(name: str) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in steps(name)]


def write_pair(recipe: dict, name: str, **changes) -> tuple[Path, Path]:
    """A run that exports its best weights after every step, and one that never looks."""
    often = write_recipe(with_valid(recipe), f"{name}-often", train=BEST, **changes)
    return often, write_recipe(recipe, f"{name}-never", train={"lr": 2e-3}, **changes)


def check_pair(name: str, *, ranks: int) -> None:
    often, never = f"{name}-often", f"{name}-never"
    losses = [row["valid_loss"] for row in read_jsonl(Path("runs") / often / "valid.jsonl")]
    assert losses[1] < losses[0], "a best was exported while training went on"
    assert max(row["num_samples"] / row["num_packs"] for row in steps(often)) > 1, "documents share packs"
    assert numbers(often) == numbers(never), name
    for rank in range(ranks):
        before, after = watched(never, rank), watched(often, rank)
        assert after == before and len(before) == 8, (name, rank)
        assert len({row["weights"] for row in before}) == 8, "every step moves the weights"
        for what in ("configuration", "generation", "adapter"):
            assert len({row[what] for row in after}) == 1, (name, what)


@pytest.mark.parametrize(("stage", "kind"), [(1, "full"), (3, "full"), (1, "lora")])
def test_exports_of_the_best_weights_leave_the_run_as_it_is(tiny_recipe, stage, kind):
    changes = {"deepspeed": f"zero{stage}", "adapter": KINDS[kind]}
    run_cells(list(write_pair(tiny_recipe, kind, **changes)), ranks=1, script=WATCHED)
    check_pair(kind, ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_all_stages_with_two_ranks_and_after_a_stop(tiny_recipe, kind):
    """Stopped by a signal after validations, and started again: still the run that never looked."""
    stages = [s for s in range(4) if (kind, s) != ("qlora", 3)]
    pairs = {
        f"{kind}{s}": write_pair(tiny_recipe, f"{kind}{s}", deepspeed=f"zero{s}", adapter=KINDS[kind])
        for s in stages
    }
    often, never = (list(paths) for paths in zip(*pairs.values(), strict=True))
    run_cells(never, ranks=2, script=WATCHED)
    run_cells(["--stop", *often], ranks=2, script=WATCHED)
    assert all(3 <= len(steps(path.stem)) < 8 for path in often)
    said = run_cells(often, ranks=2, script=WATCHED)
    assert said.count("resuming after step") == len(often)
    for name in pairs:
        check_pair(name, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_classes_are_named_in_the_export_alone(tiny_recipe, adapter):
    for name, first in (("pairs", 0), ("held", 50)):
        texts = [f"{SUBJECTS[i % 12]} {first + i}" for i in range(16)]
        sides = [{"sentence1": text, "sentence2": f"{text} {i % 2}"} for i, text in enumerate(texts)]
        write_lines(Path(f"{name}.jsonl"), [row | {"label": i % 2} for i, row in enumerate(sides)])
    recipe = {**tiny_recipe, "task": "matching", "matching": {"mode": "discriminative"}}
    data = {"train": [{"format": "pairs", "path": "pairs.jsonl"}], "test": []}
    recipe |= {"data": data, "adapter": KINDS[adapter]}
    never = write_recipe(recipe, f"{adapter}-never", train={"lr": 2e-3})
    recipe["data"] = {**data, "valid": [{"format": "pairs", "path": "held.jsonl"}]}
    often = write_recipe(recipe, f"{adapter}-often", train=BEST)
    run_cells([often, never], ranks=1, script=WATCHED)
    result = "model" if adapter == "full" else "adapter"
    assert (Path("runs") / f"{adapter}-often" / result).is_dir()
    check_pair(adapter, ranks=1)
