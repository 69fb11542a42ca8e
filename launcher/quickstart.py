"""`sftcore quickstart`: raw facts -> memory levels -> 48 samples -> a trained model -> a report.

In: nothing but this package and a package index. Out: a run folder with report.html.
Invariant: it is the ordinary path (a recipe and the table of its stages); nothing here trains, probes or
scores by itself.
Trade-off: a probe of 4 templates x 5 samples instead of 21 x 10, 20 trials a fact instead of 210: levels of
single facts are rough, and the report says so.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.model.cost import measure_recipe
from sftcore.model.pull import pull_model
from sftcore.planning.preflight import describe_plan, plan_table
from sftcore.runs.load import load_recipe
from sftcore.stages.prepare import describe_levels
from sftcore.stages.stage import wanted
from sftcore.train.devices import device_here
from sftcore.train.plan import make_schedule

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def run_quickstart(out: Path, model: str) -> None:
    """Run the whole story into `out`; a second call reuses what is there."""
    numbers = count(1)
    _say(next(numbers), "pull the model")
    folder = pull_model(model)
    recipe = load_recipe(RECIPE, [f"model.path={folder.resolve()}"], run=out)
    titles = _titles(recipe)
    for stage in wanted(recipe):
        if not stage.has_command:
            continue
        _say(next(numbers), titles[stage.name])
        result = stage.run(recipe if stage.takes == "recipe" else recipe.run_folder)
        if stage.name == "probe":
            print(describe_levels(result))
        if stage.name == "prepare":
            _, store = result
            print(f"{counted(len(store), 'sample')} in {store.folder}")
            _say(next(numbers), "plan")
            _show_plan(recipe, store)
        if stage.name == "report":
            print(result.table)
            print(f"\nopen {result.html_path.resolve()}")


def _titles(recipe: Recipe) -> dict[str, str]:
    """What each stage does, by its name."""
    select, probe = recipe.select, recipe.probe
    assert select is not None
    return {
        "probe": f"probe what it remembers ({probe.templates} templates x {probe.samples} samples)",
        "prepare": f"draw {select.n} facts of levels {select.levels}, balanced over relations; tokenise",
        "train": "train (all weights, DeepSpeed, this process)",
        "evaluate": "evaluate base and trained model on facts whose subjects were not trained",
        "report": "report",
    }


def _show_plan(recipe: Recipe, store: Any) -> None:
    schedule = make_schedule(recipe, store, world=1, cost=measure_recipe(recipe).coefficients)
    print(plan_table(describe_plan(recipe, store, schedule, device_here())))


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)
