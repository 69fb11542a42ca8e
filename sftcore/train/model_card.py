"""The model card: README.md of an exported folder, from the recipe and what the run has measured.

In: a recipe, its run folder, the folder to describe. Out: Markdown with the front matter that hubs read.
Invariant: every number in it stands in a file of the run folder; what was not measured is not mentioned, and
no path of this machine is; the code in it runs in the folder.
Trade-off: the recipe is included whole (2 kB), so that a folder copied elsewhere still says how it was made.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.display import masked
from sftcore.fsio import atomic_file, read_json, read_jsonl
from sftcore.model.adapters import is_adapter
from sftcore.model.origin import base_licence, base_name, is_on_hub
from sftcore.train.usage import usage_of


def write_card(recipe: Recipe, folder: Path) -> None:
    """Write `folder`/README.md."""
    with atomic_file(folder / "README.md") as handle:
        handle.write(card(recipe, is_peft=is_adapter(folder)))


def card(recipe: Recipe, *, is_peft: bool) -> str:
    """The text of the card."""
    base = base_name(recipe.model.path)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(recipe, base, is_peft=is_peft), sort_keys=False)}---",
        f"# {recipe.name}",
        f"{_kind_of(recipe, is_peft=is_peft)} `{base}`, by sftcore {metadata.version('sftcore')}.",
        f"## Use\n\n{usage_of(recipe, is_peft=is_peft)}",
        *_training(recipe.run_folder),
        *_results(recipe.run_folder),
        f"## Recipe\n\n```yaml\n{_portable_recipe(recipe)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(recipe: Recipe, base: str, *, is_peft: bool) -> dict[str, Any]:
    """What hubs read; https://huggingface.co/docs/hub/model-cards."""
    made_by = ["sftcore"] + ([recipe.adapter.kind] if recipe.adapter.kind != "none" else [])
    # of a folder on somebody's disk a hub would look for a model of that name
    known = {"base_model": base} if is_on_hub(base) else {}
    relation = "adapter" if is_peft else "finetune"
    return {
        **known,
        **({"base_model_relation": relation} if known else {}),
        **base_licence(recipe.model.path),
        "library_name": "peft" if is_peft else "transformers",
        "pipeline_tag": "text-classification" if recipe.classifies else "text-generation",
        "tags": made_by,
    }


def _kind_of(recipe: Recipe, *, is_peft: bool) -> str:
    if is_peft:
        return "An adapter for"
    return "Fine-tuned from" if recipe.adapter.kind == "none" else "An adapter merged into"


def _portable_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, of paths on this machine only the last name."""
    values = recipe.model_dump(mode="json")
    values["model"]["path"] = base_name(recipe.model.path)
    return yaml.safe_dump(_without_paths(values), sort_keys=False, allow_unicode=True, width=110)


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith(("/", "~")) and "\n" not in value else masked(value)


def _training(run: Path) -> list[str]:
    """Data, steps and last losses, as far as the run folder has them."""
    lines = []
    if (run / "plan.json").is_file():
        plan = read_json(run / "plan.json")
        totals = plan["totals"]
        lines += [
            f"- data: {counted(totals['num_samples'], 'sample')}, {counted(totals['epochs'], 'epoch')}; "
            f"store `{plan['store']}`",
            f"- plan: {counted(totals['num_steps'], 'step')}, {counted(totals['num_tokens'], 'token')}, "
            f"{totals['num_trained_tokens']:,} of them trained; `{plan['fingerprint']}`",
        ]
    if rows := _rows(run / "metrics.jsonl"):
        lines.append(f"- loss of the first and last step: {rows[0]['loss']:.4f}, {rows[-1]['loss']:.4f}")
    if rows := [row for row in _rows(run / "valid.jsonl") if row["valid_loss"] is not None]:
        best = min(rows, key=lambda row: float(row["valid_loss"]))
        lines.append(f"- lowest valid loss: {best['valid_loss']:.4f} after step {best['step']}")
    return ["## Training\n\n" + "\n".join(lines)] if lines else []


def _results(run: Path) -> list[str]:
    """Accuracy of each evaluated model, as far as the run folder has it."""
    found = [(f.parent.name, read_json(f)) for f in sorted(run.glob("eval/*/scores.json"))]
    lines = [
        f"- {name}: {scores['correct']} of {counted(scores['n'], 'held-out item')} right"
        f" ({scores['accuracy']:.1%})"
        for name, scores in found
        if scores.get("n")
    ]
    return ["## Results\n\n" + "\n".join(lines)] if lines else []


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path, appended=True) if path.is_file() else []
