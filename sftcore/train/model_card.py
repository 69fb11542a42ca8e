"""The model card: README.md of an exported folder, from the recipe and what the run has measured.

In: a recipe and its run folder. Out: Markdown with the front matter that hubs read.
Invariant: every number in it stands in a file of the run folder; what was not measured is not mentioned.
Trade-off: the recipe is included whole (2 kB), so that a folder copied elsewhere still says how it was made.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from sftcore.config import Recipe
from sftcore.fsio import atomic_file, read_json, read_jsonl
from sftcore.model.adapters import is_adapter
from sftcore.recipe import dump_recipe


def write_card(recipe: Recipe, folder: Path) -> None:
    """Write `folder`/README.md."""
    with atomic_file(folder / "README.md") as handle:
        handle.write(card(recipe, is_peft=is_adapter(folder)))


def card(recipe: Recipe, *, is_peft: bool) -> str:
    """The text of the card."""
    base = Path(recipe.model.path).name if recipe.model.path.startswith("/") else recipe.model.path
    front = ["---", f"base_model: {base}", f"library_name: {'peft' if is_peft else 'transformers'}"]
    front += ["pipeline_tag: text-generation", "tags:", "- sftcore", "---"]
    parts = [
        "\n".join(front),
        f"# {recipe.name}",
        f"Fine-tuned from `{base}` with sftcore {metadata.version('sftcore')}.",
        *_training(recipe.run_folder),
        *_results(recipe.run_folder),
        f"## Recipe\n\n```yaml\n{dump_recipe(recipe)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _training(run: Path) -> list[str]:
    """Data, steps and last losses, as far as the run folder has them."""
    lines = []
    if (run / "plan.json").is_file():
        plan = read_json(run / "plan.json")
        totals = plan["totals"]
        lines += [
            f"- data: {totals['num_samples']:,} samples, {totals['epochs']} epoch(s); "
            f"store `{plan['store']}`",
            f"- plan: {totals['num_steps']:,} steps, {totals['num_tokens']:,} tokens, "
            f"{totals['num_trained_tokens']:,} of them trained; `{plan['fingerprint']}`",
        ]
    if rows := _rows(run / "metrics.jsonl"):
        lines.append(f"- loss of the first and last step: {rows[0]['loss']:.4f}, {rows[-1]['loss']:.4f}")
    if rows := _rows(run / "valid.jsonl"):
        best = min(rows, key=lambda row: float(row["valid_loss"]))
        lines.append(f"- lowest valid loss: {best['valid_loss']:.4f} after step {best['step']}")
    return ["## Training\n\n" + "\n".join(lines)] if lines else []


def _results(run: Path) -> list[str]:
    """Accuracy of each evaluated model, as far as the run folder has it."""
    found = [(f.parent.name, read_json(f)) for f in sorted(run.glob("eval/*/scores.json"))]
    lines = [
        f"- {name}: {scores['correct']} of {scores['n']} held-out items right ({scores['accuracy']:.1%})"
        for name, scores in found
        if scores.get("n")
    ]
    return ["## Results\n\n" + "\n".join(lines)] if lines else []


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path, appended=True) if path.is_file() else []
