"""Objectives: metrics and rates land in metrics.jsonl by name, samples' losses are those of each alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, run_cells, start_ranks, steps, wait_for_all, weights, weights_hash, write_recipe
from transformers import AutoModelForCausalLM

from sftcore.config import Recipe
from sftcore.data.seam import UNTRAINED
from sftcore.errors import UserInputError
from sftcore.objectives import OBJECTIVES, objective_of
from sftcore.recipe import load_recipe
from sftcore.stages.prepare import prepare
from sftcore.train.metrics import StepMetrics

# a rank that trains with an objective of its own, and writes the loss of each sample before it exports
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from sftcore.stages import train as training
from sftcore.stages.prepare import prepare
from sftcore import dist
from sftcore.objectives import OBJECTIVES
from sftcore.objectives.next_token import NextToken
from sftcore.recipe import load_recipe
from sftcore.train.batches import whole_set
from sftcore.train.rates import RATES
from sftcore.train.sample_losses import evaluate_samples
torch.set_num_threads(1)
class Counting(NextToken):
    def forward(self, batch):
        loss, metrics = super().forward(batch)
        number = torch.tensor(len(batch.targets))
        return loss, metrics | {'num_targets': number, 'twisted': self.rates['twist'] * len(batch.targets)}
OBJECTIVES['counting'] = Counting
RATES['twist'] = lambda step, num_steps, settings: step / num_steps
write = training.export_weights
def evaluated_and_written(engine, tokenizer, recipe, *, folder):
    store = prepare(recipe)[1]
    source = whole_set(store, capacity=recipe.batch.capacity, seed=0, normalise='token')
    found = evaluate_samples(engine, source)
    text = json.dumps([found.ids, found.mean_losses.tolist(), found.num_trained.tolist()])
    Path(f'{recipe.name}-{dist.rank()}.json').write_text(text)
    write(engine, tokenizer, recipe, folder=folder)
training.export_weights = evaluated_and_written
for path in sys.argv[1:]:
    training.train_recipe(load_recipe(Path(path)))
"""


def test_metrics_and_losses_of_samples_are_exact_on_one_and_two_ranks(tiny_recipe):
    """Three samples a step on two ranks: one has a pack without work, which counts for nothing."""
    Path("counting.py").write_text(SCRIPT)
    changes = {"objective": {"name": "counting"}, "batch": {"samples_per_step": 3, "capacity": 60}}
    one = write_recipe(tiny_recipe, "one", **changes, deepspeed="zero1")
    two = write_recipe(tiny_recipe, "two", **changes, deepspeed="zero3")
    run_cells([one], ranks=1, script="counting.py")
    run_cells([two], ranks=2, script="counting.py")
    rows = steps("two")
    assert any(row["num_packs"] % 2 for row in rows), "a rank was idle"
    for row, other in zip(rows, steps("one"), strict=True):
        assert row["num_targets"] == other["num_targets"] == row["num_trained_tokens"]
        assert row["twist"] == (row["step"] - 1) / len(rows)
        assert row["twisted"] == pytest.approx(row["twist"] * row["num_targets"])
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    found, again, alone = (
        json.loads(Path(f"{name}.json").read_text()) for name in ("two-0", "two-1", "one-0")
    )
    assert found == again
    assert found[0] == alone[0] and found[2] == alone[2]
    assert found[1] == pytest.approx(alone[1], rel=1e-3)
    ids, losses, counts = losses_alone(two)
    assert (found[0], found[2]) == (ids, counts) and found[1] == pytest.approx(losses, rel=1e-4)
    assert max(losses) > 1.01 * min(losses), "they differ"


def losses_alone(path: Path) -> tuple[list[str], list[float], list[int]]:
    """By transformers, sample by sample, in the order of the store."""
    store = prepare(load_recipe(path))[1]
    model = AutoModelForCausalLM.from_pretrained(f"runs/{path.stem}/model", dtype=torch.float32)
    losses, counts = [], []
    for i in range(len(store)):
        labels = torch.tensor(store[i].labels).long()
        logits = model(input_ids=torch.tensor(store[i].input_ids).long()[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
        counts.append(int((labels != UNTRAINED).sum()))
    return list(store.ids), losses, counts


def test_so_many_steps_on_two_ranks_end_well_and_go_on(tiny_recipe):
    whole, cut = (write_recipe(tiny_recipe, name, checkpoint={"save_every_steps": 99}) for name in ("w", "c"))
    ranks = start_ranks(2, str(ROOT / "launcher" / "worker.py"), str(cut), "--max-steps", "3")
    assert wait_for_all(ranks) == [0, 0], [rank.output()[1][-3000:] for rank in ranks]
    assert len(steps("c")) == 3 and not Path("runs/c/model").exists()
    assert [f.name for f in Path("runs/c/checkpoints").iterdir()] == ["step-000003"]
    run_cells([whole, cut], ranks=2)
    assert weights_hash("c") == weights_hash("w") and len(weights("c")) > 5


def test_an_objective_is_chosen_by_the_samples_or_by_name(tiny_recipe):
    def chosen(name="auto", **changes):
        return objective_of(Recipe.model_validate(tiny_recipe | {"objective": {"name": name}} | changes))

    pairs = {"task": "matching", "data": {"train": [{"format": "pairs", "path": "x"}]}}
    assert chosen() is chosen("next_token") is OBJECTIVES["next_token"]
    assert chosen(**pairs, matching={"mode": "discriminative"}) is OBJECTIVES["classify"]
    assert chosen(**pairs, matching={"mode": "encoder"}) is OBJECTIVES["encode"]
    with pytest.raises(UserInputError, match=r"(?s)no objective for the samples of task qa.*next_token'"):
        chosen("next_tokens")
    with pytest.raises(UserInputError, match=r"(?s)task matching.*got: encode\n.*allowed: auto, classify"):
        chosen("encode", **pairs, matching={"mode": "discriminative"})


def test_a_metric_takes_no_other_numbers_name():
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1) | {"rates": {"lr": 0.1}}
    row = StepMetrics(**values | {"metrics": {"num_hits": 3.0}}).row()
    assert (row["lr"], row["num_hits"], row["num_pad_tokens"]) == (0.1, 3.0, 0)
    assert list(row)[:8] == [
        *("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_trained_tokens", "num_pad_tokens")
    ]
    with pytest.raises(ValueError, match=r"numbers of these names already: \['lr'\]"):
        StepMetrics(**values | {"metrics": {"lr": 3.0}}).row()
