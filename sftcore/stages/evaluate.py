"""Evaluation: base and trained model, and what else the recipe asks for, on the held-out items.

In: a resolved recipe, and what training left. Out: RUN/eval/NAME/{predictions.jsonl, scores.json,
manifest.json}, RUN/eval/drift.json.
Invariant: scores are found again, not made again, while model, items, prompts and settings are the same;
shards take whole batches, so their number changes nothing.
Trade-off: one model is in memory at a time, so that an 8B base and its tuned copy need 16 GB, not 32.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.data.ledger import Ledger
from sftcore.data.prepare import load_records
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.tokens import Tokenizer, codec_of
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.drift import (
    best_templates,
    drift,
    drift_level,
    drift_prompts,
    first_logits,
    summarise_drift,
)
from sftcore.evaluate.few_shot import choose_examples
from sftcore.evaluate.generate import predict, with_levels
from sftcore.evaluate.pairs import has_learnt_labels, judge_pairs, pair_rows
from sftcore.evaluate.score import CODE_VERSION, score
from sftcore.fsio import (
    fingerprint_of,
    folder_lock,
    read_jsonl,
    read_object,
    write_json,
    write_jsonl,
)
from sftcore.generate.own import OwnGenerator
from sftcore.knowledge.level_files import LEVELS_BY_TEMPLATE, LEVELS_FILE, check_same_facts, read_levels
from sftcore.knowledge.templates import load_relations
from sftcore.model.adapters import is_adapter
from sftcore.model.identity import fingerprint_model
from sftcore.model.load import load_for_decoding
from sftcore.model.weight_files import check_unchanged
from sftcore.precision import dtype_of
from sftcore.recipe import changed
from sftcore.runs.claim import open_run, record_seconds
from sftcore.settings import MatchingSettings
from sftcore.shares import SHARDS, WHOLE, Share, Vouched, shard_folders, share_done, whole_set
from sftcore.stages.held_out import fitting, scorable_records
from sftcore.stages.prepare import recipe_tokenizer
from sftcore.tasks import TASKS

log = logging.getLogger("sftcore.evaluating")
ROWS, SCORES = FILES = ("predictions.jsonl", "scores.json")
OWN_NAMES = ("base", "tuned", "fewshot")  # of RUN/eval/NAME: what reports take for the run's own models


def evaluate(
    recipe: Recipe, *, model: Path | None = None, merge_only: bool = False
) -> dict[str, dict[str, Any]]:
    """Score the base and the trained model (or `model` alone) on the held-out items; RUN/eval/NAME.

    Args:
        merge_only: everything has been predicted by `evaluate_share`.

    Returns:
        scores by name: base, tuned, fewshot (with evaluate.few_shot), or that of `model` (see `_name_of`).

    Raises:
        UserInputError: the recipe has no held-out data, there is no such model, or shards are missing.
    """
    with open_run(recipe, purpose="evaluation") as run:
        items = _items(recipe, run, model)
        tasks = _tasks(items, model)
        scores = {task.name: _evaluate_one(task, merge_only=merge_only) for task in tasks}
        if recipe.evaluate.drift and "tuned" in scores:
            _measure_drift(items, {task.name: task.folder for task in tasks})
        return scores


def evaluate_share(recipe: Recipe, share: Share, *, model: Path | None = None) -> str:
    """Predict the items of one job's batches; says what was done.

    Raises:
        UserInputError: as `evaluate`.
    """
    with open_run(recipe, purpose="evaluating a shard", shared=True) as run:
        found = []
        for task in _tasks(_items(recipe, run, model), model):
            folder = share.folder(task.target)
            made = Vouched(folder, FILES, task.manifest())
            with folder_lock(folder, purpose="evaluating this shard"):
                if not made.is_made():
                    write_jsonl(folder / ROWS, _predict(task, share))
                    made.vouch()
                found.append(f"{task.name} {len(read_jsonl(folder / ROWS))}")
    return share_done(share, f"{', '.join(found)} items", command="evaluate")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """What is evaluated.

    Args:
        records: held-out, "test" and "ood".
        levels: memory level by split and id, as far as known.
    """

    recipe: Recipe
    run: Path
    tokenizer: Tokenizer
    records: list[Record]
    levels: dict[tuple[str, str], int]


def _items(recipe: Recipe, run: Path, model: Path | None) -> _Items:
    tokenizer = recipe_tokenizer(recipe)
    folder = next(iter(_models_to_evaluate(recipe, model).values()))
    records = scorable_records(recipe, folder, tokenizer, run)
    levels = _known_levels(recipe, run, records)
    return _Items(recipe=recipe, run=run, tokenizer=tokenizer, records=records, levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One model to evaluate.

    Args:
        name: of RUN/eval/NAME.
        folder: of the model, or a hub name.
        examples: solved before each prompt.
    """

    name: str
    items: _Items
    folder: str
    examples: Sequence[Record] = ()

    @property
    def target(self) -> Path:
        """RUN/eval/NAME."""
        return self.items.run / "eval" / self.name

    @property
    def prompter(self) -> Prompter:
        """Of the recipe."""
        return Prompter(PromptOptions.of(self.items.recipe), self.items.tokenizer)

    def manifest(self) -> dict[str, Any]:
        """What the predictions depend on."""
        recipe, records = self.items.recipe, self.items.records
        prompts = self.prompter.prompt_ids_batch(records)
        manifest: dict[str, Any] = {
            "code": CODE_VERSION,
            "model_fingerprint": fingerprint_model(self.folder),
            "prompts_fingerprint": fingerprint_of(
                [[r.id, r.split, ids] for r, ids in zip(records, prompts, strict=True)]
            ),
            "levels_fingerprint": fingerprint_of([[*key, n] for key, n in self.items.levels.items()]),
            "items_fingerprint": fingerprint_of([asdict(record.content) for record in records]),
            "settings": recipe.evaluate.model_dump(),
            "examples": [example.id for example in self.examples],
        }
        has_learnt = has_learnt_labels(self.folder)
        return manifest | TASKS[recipe.task].grading(recipe.matching, has_learnt=has_learnt)


def _tasks(items: _Items, model: Path | None) -> list[_Task]:
    """Base and tuned, and the base model after examples if asked for; or `model` alone."""
    folders = _models_to_evaluate(items.recipe, model)
    for folder in folders.values():
        check_unchanged(Path(folder))
    tasks = [_Task(name=name, items=items, folder=folder) for name, folder in folders.items()]
    return tasks if model is not None else [*tasks, *_few_shot_tasks(items)]


def _models_to_evaluate(recipe: Recipe, model: Path | None) -> dict[str, str]:
    if model is not None:
        if not (model / "config.json").is_file() and not is_adapter(model):
            raise UserInputError(Problem(what="no model in this folder", where=f"--model {model}"))
        return {_name_of(model): str(model.resolve())}
    result = recipe.result_folder
    tuned = {"tuned": str(result.resolve())} if result.is_dir() else {}
    if recipe.classifies and not tuned:
        what = "nothing to evaluate: the base model has no classifier yet"
        raise UserInputError(Problem(what=what, where=str(result), remedy="run: sftcore train RECIPE"))
    return tuned if recipe.classifies else {"base": recipe.model.path, **tuned}


def _name_of(model: Path) -> str:
    """Of RUN/eval/NAME: the folder's, unless the run's own models go by it.

    >>> _name_of(Path("/restored/q10")), _name_of(Path("/restored/base"))
    ('q10', 'model-base')
    """
    name = model.resolve().name
    return f"model-{name}" if name in OWN_NAMES else name


def _known_levels(recipe: Recipe, run: Path, records: Sequence[Record]) -> dict[tuple[str, str], int]:
    """Levels of those items that were probed; of all splits, as ids are unique within one only.

    Raises:
        UserInputError: they are another model's, or of facts that have changed since.
    """
    if not (run / LEVELS_FILE).is_file():
        return {}
    fingerprint, dtype = fingerprint_model(recipe.model.path), dtype_of(recipe.model)
    levels = read_levels(run, model_fingerprint=fingerprint, dtype=dtype)
    items = {(record.split, record.id) for record in records}
    found = [level for level in levels if (level.split, level.id) in items]
    check_same_facts(found, records, where=run / LEVELS_FILE)
    if len(found) < len(records):
        log.warning("%d of %d items have no memory level", len(records) - len(found), len(records))
    return {(level.split, level.id): level.level for level in found}


def _few_shot_tasks(items: _Items) -> list[_Task]:
    """The base model after solved training examples, if the recipe asks for it and the model can do it."""
    recipe, task = items.recipe, TASKS[items.recipe.task]
    if not recipe.evaluate.few_shot:
        return []
    if recipe.classifies:
        log.info("few-shot: left out, as the base model has no classifier yet")
        return []
    found = [r for r in load_records(recipe, "train", Ledger()) if r.content.is_bare]
    is_explained = task.needs_reasons(recipe.matching)
    examples = choose_examples(found, recipe.evaluate.few_shot, seed=recipe.seed, explained=is_explained)
    settings = task.with_examples(recipe.matching, [example.content for example in examples])
    if settings is not None:  # prompts know of examples themselves
        items, examples = _after_examples(items, settings), []
        if not items.records:
            return []
    return [_Task(name="fewshot", items=items, folder=recipe.model.path, examples=examples)]


def _after_examples(items: _Items, settings: MatchingSettings) -> _Items:
    """The same pairs after examples; what gets too long is listed in RUN/ledger.fewshot.jsonl."""
    recipe, ledger = changed(items.recipe, matching=settings), Ledger()
    records = fitting(recipe, recipe.model.path, items.tokenizer)(items.records, ledger)
    if ledger.num_rejected:
        ledger.write(items.run / "ledger.fewshot.jsonl")
    return replace(items, recipe=recipe, records=records)


def _evaluate_one(task: _Task, *, merge_only: bool) -> dict[str, Any]:
    """Predictions and scores of one model; found again if model, items, prompts and settings are the same."""
    target, manifest, run = task.target, task.manifest(), task.items.run
    made = Vouched(target, FILES, manifest)
    if made.is_made():
        log.info("%s: already evaluated in %s", task.name, target)
        return read_object(target / SCORES)
    started = time.perf_counter()
    rows = _merged_rows(task, manifest)
    if rows is None:
        if merge_only:
            raise UserInputError(_not_all_shards(target))
        rows = _predict(task, WHOLE)
    golds = [record.content.gold for record in task.items.records]
    scores = score(rows) | TASKS[task.items.recipe.task].more_scores(golds, rows)
    made.withdraw()
    write_jsonl(target / ROWS, rows)
    write_json(target / SCORES, scores)
    made.vouch()
    shutil.rmtree(target / SHARDS, ignore_errors=True)
    record_seconds(run, f"evaluate_{task.name}", time.perf_counter() - started)
    return scores


def _merged_rows(task: _Task, manifest: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of all shards in the items' order; None unless a whole set was made from the same inputs."""
    folders = shard_folders(task.target)
    whole = whole_set([folder for folder in folders if Vouched(folder, FILES, manifest).is_made()])
    if whole is None:
        return None
    rows = {(row["split"], row["id"]): row for folder in whole for row in read_jsonl(folder / ROWS)}
    return [rows[record.split, record.id] for record in task.items.records]


def _not_all_shards(target: Path) -> Problem:
    found = [folder.name for folder in shard_folders(target)]
    return Problem(
        what="not all shards of this evaluation are there",
        where=str(target / SHARDS),
        got=", ".join(found) or "none",
        remedy="sftcore evaluate RECIPE --shard i/N for every i from 0 to N-1, with the same recipe",
    )


def _predict(task: _Task, share: Share) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl of a job's share of the items."""
    items, recipe, records = task.items, task.items.recipe, task.items.records
    log.info("evaluating %s (%s) on %s", task.name, task.folder, counted(len(records), "item"))
    if TASKS[recipe.task].answers == "labels":
        quantised = recipe.adapter.kind == "qlora" and is_adapter(Path(task.folder))
        verdicts = judge_pairs(recipe, task.folder, records, task.prompter, quantised=quantised, share=share)
        return pair_rows(records, verdicts, task.prompter)
    rows = predict(
        records,
        OwnGenerator(_load_evaluated(recipe, task.folder), items.tokenizer),
        task.prompter,
        recipe.evaluate,
        examples=task.examples,
        share=share,
    )
    return with_levels(rows, items.levels)


def _load_evaluated(recipe: Recipe, folder: str) -> PreTrainedModel:
    settings = recipe.model.model_copy(update={"path": folder})
    quantised = recipe.adapter.kind == "qlora" and is_adapter(Path(folder))
    return load_for_decoding(settings, quantised=quantised)


def _measure_drift(items: _Items, folders: dict[str, str]) -> None:
    """RUN/eval/drift.json: how far first tokens moved on the facts known best, in their best wording.

    Raises:
        UserInputError: no probe has shown which wording is the best.
    """
    path = items.run / LEVELS_BY_TEMPLATE
    if not path.is_file():
        remedy = "sftcore probe RECIPE, or evaluate.drift: false"
        raise UserInputError(Problem(what="no hits by template yet", where=str(path), remedy=remedy))
    probed = [r for r in items.records if r.split == "test" and ("test", r.id) in items.levels]
    if not probed:
        log.warning("no level of a held-out fact in domain is known: no drift is measured")
        return
    level_of = {r.id: items.levels["test", r.id] for r in probed}
    level = drift_level(level_of.values())
    known = [r for r in probed if level_of[r.id] == level]
    file = items.recipe.data.relations
    relations = load_relations(Path(file) if file else None)
    texts = drift_prompts(known, best_templates(read_object(path)), relations)
    prompts = codec_of(items.tokenizer).encode_prompts(texts)
    logits = {}
    for name in ("tuned", "base"):  # one model in memory at a time
        logits[name] = first_logits(_load_evaluated(items.recipe, folders[name]), prompts)
    report = summarise_drift(known, drift(logits["tuned"], logits["base"]), level=level)
    write_json(items.run / "eval" / "drift.json", report)
    log.info("drift on %s of level %d: %.3f nats", counted(len(known), "fact"), level, report["mean_kl_nats"])
