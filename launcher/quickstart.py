"""`sftcore quickstart`: raw facts -> memory levels -> 48 samples -> a trained model -> a report.

In: nothing but this package and a package index. Out: a run folder with report.html.
Invariant: it is the ordinary path (a recipe and its stages); nothing here trains, probes or scores by
itself.
Trade-off: a probe of 4 templates x 5 samples instead of 21 x 10, 20 trials a fact instead of 210: levels of
single facts are rough, and the report says so.
"""

from __future__ import annotations

from pathlib import Path

from sftcore.amounts import counted
from sftcore.model.cost import measure_recipe
from sftcore.model.pull import pull_model
from sftcore.planning.preflight import describe_plan, plan_table
from sftcore.recipe import load_recipe
from sftcore.runs.claim import with_run
from sftcore.runs.settle import settle
from sftcore.stages.evaluate import evaluate
from sftcore.stages.prepare import describe_levels, prepare, probe
from sftcore.stages.train import train_recipe
from sftcore.study.report import write_report
from sftcore.train.devices import device_here
from sftcore.train.plan import make_schedule

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def run_quickstart(out: Path, model: str) -> None:
    """Run the whole story into `out`; a second call reuses what is there."""
    _say(1, "pull the model")
    folder = pull_model(model)
    recipe = settle(with_run(load_recipe(RECIPE, [f"model.path={folder.resolve()}"]), str(out)))
    _say(2, f"probe what it remembers ({recipe.probe.templates} templates x {recipe.probe.samples} samples)")
    print(describe_levels(probe(recipe)))
    assert recipe.select is not None
    _say(
        3, f"draw {recipe.select.n} facts of levels {recipe.select.levels}, balanced over relations; tokenise"
    )
    _, store = prepare(recipe)
    print(f"{counted(len(store), 'sample')} in {store.folder}")
    _say(4, "plan")
    schedule = make_schedule(recipe, store, world=1, cost=measure_recipe(recipe).coefficients)
    print(plan_table(describe_plan(recipe, store, schedule, device_here())))
    _say(5, "train (all weights, DeepSpeed, this process)")
    train_recipe(recipe)
    _say(6, "evaluate base and trained model on facts whose subjects were not trained")
    evaluate(recipe)
    _say(7, "report")
    result = write_report(recipe.run_folder)
    print(result.table)
    print(f"\nopen {result.html_path.resolve()}")


def _say(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)
