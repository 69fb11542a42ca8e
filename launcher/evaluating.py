"""Evaluation: base and trained model, and what else the recipe asks for, on the held-out items.

In: a resolved recipe, and what training left. Out: RUN/eval/NAME/{predictions.jsonl, scores.json,
manifest.json}, RUN/eval/drift.json.
Invariant: scores are found again, not made again, while model, items, prompts and settings are the same.
Trade-off: one model is in memory at a time, so that an 8B base and its tuned copy need 16 GB, not 32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from launcher.run_folder import open_run, record_seconds
from launcher.stages import recipe_tokenizer, usable_records
from sftcore.config import Recipe
from sftcore.data.ledger import Ledger
from sftcore.data.prepare import load_records
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.tokens import Tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.drift import best_templates, drift, drift_prompts, first_logits, summarise_drift
from sftcore.evaluate.few_shot import choose_examples, with_examples
from sftcore.evaluate.generate import predict
from sftcore.evaluate.pairs import judge_pairs, pair_rows, pair_scores
from sftcore.evaluate.score import score
from sftcore.fsio import (
    fingerprint_of,
    read_json,
    write_json,
    write_jsonl,
)
from sftcore.knowledge.levels import MAX_LEVEL
from sftcore.knowledge.probe import (
    TEMPLATES,
    fingerprint_model,
    read_levels,
)
from sftcore.knowledge.templates import load_relations
from sftcore.model.adapters import is_adapter
from sftcore.model.load import load_for_decoding

log = logging.getLogger("sftcore.evaluating")


def evaluate(recipe: Recipe, *, model: Path | None = None) -> dict[str, dict[str, Any]]:
    """Score the base and the trained model (or `model` alone) on the held-out items; RUN/eval/NAME.

    Returns:
        scores by name: base, tuned, fewshot (with evaluate.few_shot), or the folder name of `model`.

    Raises:
        UserInputError: the recipe has no held-out data, or there is no such model.
    """
    with open_run(recipe, purpose="evaluation") as run:
        folders = _models_to_evaluate(recipe, model)
        items = _items(recipe, run)
        scores = {name: _evaluate_one(items, name, folder) for name, folder in folders.items()}
        if model is None and recipe.evaluate.few_shot:
            scores |= _evaluate_few_shot(items)
        if recipe.evaluate.drift and "tuned" in folders:
            _measure_drift(items, folders)
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """What is evaluated.

    Args:
        records: held-out, "test" and "ood".
        levels: memory level by record id, as far as known.
    """

    recipe: Recipe
    run: Path
    tokenizer: Tokenizer
    records: list[Record]
    levels: dict[str, int]


def _items(recipe: Recipe, run: Path) -> _Items:
    tokenizer = recipe_tokenizer(recipe)
    records = usable_records(recipe, run, "test", "ood")
    if not records:
        raise UserInputError(
            Problem(what="nothing to evaluate on", where="data.test", remedy="give held-out sources there")
        )
    levels = _known_levels(recipe, run)
    return _Items(recipe=recipe, run=run, tokenizer=tokenizer, records=records, levels=levels)


def _models_to_evaluate(recipe: Recipe, model: Path | None) -> dict[str, str]:
    if model is not None:
        if not (model / "config.json").is_file() and not is_adapter(model):
            raise UserInputError(Problem(what="no model in this folder", where=f"--model {model}"))
        return {model.resolve().name: str(model.resolve())}
    result = recipe.result_folder
    tuned = {"tuned": str(result.resolve())} if result.is_dir() else {}
    if recipe.classifies and not tuned:
        what = "nothing to evaluate: the base model has no classifier yet"
        raise UserInputError(Problem(what=what, where=str(result), remedy="run: sftcore train RECIPE"))
    return tuned if recipe.classifies else {"base": recipe.model.path, **tuned}


def _known_levels(recipe: Recipe, run: Path) -> dict[str, int]:
    if not (run / "levels.jsonl").is_file():
        return {}
    levels = read_levels(run, model_fingerprint=fingerprint_model(recipe.model.path))
    return {level.id: level.level for level in levels}


def _evaluate_few_shot(items: _Items) -> dict[str, dict[str, Any]]:
    """Scores of the base model behind solved training examples, by the name "fewshot"."""
    recipe = items.recipe
    if recipe.classifies:
        log.info("few-shot: left out, as the base model has no classifier yet")
        return {}
    found = load_records(recipe, "train", Ledger())
    examples = choose_examples(found, recipe.evaluate.few_shot, seed=recipe.seed)
    if recipe.task == "matching":
        shown = replace(items, recipe=with_examples(recipe, examples))
        return {"fewshot": _evaluate_one(shown, "fewshot", recipe.model.path)}
    return {"fewshot": _evaluate_one(items, "fewshot", recipe.model.path, examples)}


def _evaluate_one(items: _Items, name: str, folder: str, examples: Sequence[Record] = ()) -> dict[str, Any]:
    """Predictions and scores of one model; found again if model, items, prompts and settings are the same."""
    recipe, records = items.recipe, items.records
    prompter = Prompter(PromptOptions.of(recipe), items.tokenizer)
    target = items.run / "eval" / name
    manifest = {
        "model_fingerprint": fingerprint_model(folder),
        "prompts_fingerprint": fingerprint_of(
            [[r.id, r.split, ids] for r, ids in zip(records, prompter.prompt_ids_batch(records), strict=True)]
        ),
        "levels_fingerprint": fingerprint_of(items.levels),
        "settings": recipe.evaluate.model_dump(),
        "examples": [example.id for example in examples],
    }
    if recipe.task == "matching":
        manifest["matching"] = recipe.matching.model_dump(mode="json")
    if (target / "manifest.json").is_file() and read_json(target / "manifest.json") == manifest:
        log.info("%s: already evaluated in %s", name, target)
        return dict(read_json(target / "scores.json"))
    log.info("evaluating %s (%s) on %d items", name, folder, len(records))
    started = time.perf_counter()
    rows, scores = _predict_and_score(items, folder, prompter, examples)
    (target / "manifest.json").unlink(missing_ok=True)
    write_jsonl(target / "predictions.jsonl", rows)
    write_json(target / "scores.json", scores)
    write_json(target / "manifest.json", manifest)
    record_seconds(items.run, f"evaluate_{name}", time.perf_counter() - started)
    return scores


def _predict_and_score(
    items: _Items, folder: str, prompter: Prompter, examples: Sequence[Record]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The content of predictions.jsonl and of scores.json."""
    recipe, records = items.recipe, items.records
    if recipe.task == "matching":
        quantised = recipe.adapter.kind == "qlora" and is_adapter(Path(folder))
        verdicts = judge_pairs(recipe, folder, records, prompter, quantised=quantised)
        rows = pair_rows(records, verdicts, prompter)
        return rows, score(rows) | {"pairs": pair_scores(records, verdicts)}
    rows = predict(
        records,
        _load_evaluated(recipe, folder),
        items.tokenizer,
        prompter,
        recipe.evaluate,
        levels=items.levels,
        examples=examples,
    )
    return rows, score(rows)


def _load_evaluated(recipe: Recipe, folder: str) -> PreTrainedModel:
    settings = recipe.model.model_copy(update={"path": folder})
    quantised = recipe.adapter.kind == "qlora" and is_adapter(Path(folder))
    return load_for_decoding(settings, quantised=quantised)


def _measure_drift(items: _Items, folders: dict[str, str]) -> None:
    """RUN/eval/drift.json: how far first tokens moved on held-out facts of level 4, in their best wording.

    Raises:
        UserInputError: no probe has told which wording is the best.
    """
    path = items.run / TEMPLATES
    if not path.is_file():
        remedy = "sftcore probe RECIPE, or evaluate.drift: false"
        raise UserInputError(Problem(what="no hits by template yet", where=str(path), remedy=remedy))
    known = [r for r in items.records if items.levels.get(r.id) == MAX_LEVEL and r.split == "test"]
    if not known:
        log.warning("no held-out fact has level %d: no drift is measured", MAX_LEVEL)
        return
    file = items.recipe.data.relations
    relations = load_relations(Path(file) if file else None)
    texts = drift_prompts(known, best_templates(read_json(path)), relations)
    prompts = [items.tokenizer(text)["input_ids"] for text in texts]
    logits = {}
    for name in ("tuned", "base"):  # one model in memory at a time
        logits[name] = first_logits(_load_evaluated(items.recipe, folders[name]), prompts)
    report = summarise_drift(known, drift(logits["tuned"], logits["base"]))
    write_json(items.run / "eval" / "drift.json", report)
    log.info("drift on %d facts of level %d: %.3f nats", len(known), MAX_LEVEL, report["mean_kl_nats"])
