"""The stages of a run on one machine: prepare, probe, select, evaluate.

In: a resolved recipe. Out: a token store; RUN/levels.jsonl, selection.jsonl, ledger.jsonl, eval/*.
Invariant: a stage whose inputs have not changed finds its files and does nothing.
Trade-off: stages hand over through files, not objects, so each can be run, killed and looked at alone;
reading them again costs under a second.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from launcher.run_folder import open_run, record_seconds
from sftcore.config import Recipe
from sftcore.data.check import check_store, check_text, draw_check
from sftcore.data.contents import Pair
from sftcore.data.draws import draw_pairs
from sftcore.data.ledger import Ledger
from sftcore.data.prepare import load_records, prepare_shard, prepare_store
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.splits import with_valid_as_train
from sftcore.data.store import TokenStore
from sftcore.data.tokens import Tokenizer, load_tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.evaluate.drift import best_templates, drift, drift_prompts, first_logits, summarise_drift
from sftcore.evaluate.few_shot import choose_examples
from sftcore.evaluate.generate import predict
from sftcore.evaluate.pairs import judge_pairs, pair_rows, pair_scores
from sftcore.evaluate.score import score
from sftcore.fsio import (
    atomic_file,
    fingerprint_of,
    folder_lock,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from sftcore.knowledge.levels import MAX_LEVEL, FactLevel, level_counts
from sftcore.knowledge.probe import (
    SHARDS,
    TEMPLATES,
    Probe,
    fingerprint_model,
    probe_facts,
    probe_shard,
    read_levels,
)
from sftcore.knowledge.questions import without_trivial
from sftcore.knowledge.selection import select_facts
from sftcore.knowledge.templates import load_relations
from sftcore.model.adapters import is_adapter
from sftcore.model.load import load_for_decoding

log = logging.getLogger("sftcore.stages")
SPLITS = ("train", "test", "ood")


def prepare(
    recipe: Recipe, *, num_workers: int | None = None, merge_only: bool = False
) -> tuple[Tokenizer, TokenStore]:
    """The tokenizer and the token store of the training samples; selects by memory level first, if asked.

    Args:
        num_workers: processes; None: one a core.
        merge_only: the parts have been made by `prepare_share`.

    Raises:
        UserInputError: bad data; or `select` is set and nothing was probed yet.
    """
    tokenizer = _tokenizer(recipe)
    store = prepare_store(
        recipe, tokenizer, only_ids=_chosen(recipe), num_workers=num_workers, merge_only=merge_only
    )
    return tokenizer, store


def prepare_valid(recipe: Recipe, tokenizer: Tokenizer) -> TokenStore:
    """The token store of data.valid."""
    return prepare_store(with_valid_as_train(recipe), tokenizer)


def prepare_share(recipe: Recipe, shard: str, *, num_workers: int | None, is_alone: bool) -> str:
    """Make the parts of one job of an array; says what was done.

    Args:
        shard: "i/N", i from 0.
        is_alone: no other option was given that needs the whole store.

    Raises:
        UserInputError: not of that form, or not alone.
    """
    job, num_jobs = _share(shard)
    if not is_alone:
        raise UserInputError(Problem(what="--merge and --check need all shards", where="--shard", got=shard))
    mine, total = prepare_shard(
        recipe,
        _tokenizer(recipe),
        job=job,
        num_jobs=num_jobs,
        only_ids=_chosen(recipe),
        num_workers=num_workers,
    )
    return f"shard {shard}: {mine} of {total} parts are done; then: sftcore prepare RECIPE --merge"


def _share(shard: str) -> tuple[int, int]:
    """i and N of "i/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserInputError(
            Problem(
                what="a share is i/N with i from 0 to N-1", where="--shard", got=shard, allowed="0/4 to 3/4"
            )
        )
    return int(match[1]), int(match[2])


def write_check(recipe: Recipe, store: TokenStore) -> str:
    """Report on the data in RUN/check.txt, check.json and check.png; returns the text."""
    run = recipe.run_folder
    report = check_store(recipe, store)
    text = check_text(report)
    with atomic_file(run / "check.txt") as handle:
        handle.write(text + "\n")
    write_json(run / "check.json", report)
    draw_check(report, run / "check.png")
    return f"{text}\n\n{run / 'check.png'}"


def _chosen(recipe: Recipe) -> set[str] | None:
    if recipe.select is None:
        return None
    return draw(recipe) if recipe.task == "matching" else {level.id for level in select(recipe)}


def draw(recipe: Recipe) -> set[str]:
    """Draw training pairs, balanced over labels if so asked; RUN/selection.jsonl lists them."""
    settings = recipe.select
    assert settings is not None and settings.balance != "relation"
    records = load_records(recipe, "train", Ledger())
    n = len(records) if settings.n == "all" else settings.n
    chosen = draw_pairs(records, n, balance=settings.balance, seed=recipe.seed, draw=settings.draw)
    rows = [{"id": r.id, "label": r.content.label} for r in chosen if isinstance(r.content, Pair)]
    _write_selection(recipe.run_folder, rows)
    return {record.id for record in chosen}


def select(recipe: Recipe) -> list[FactLevel]:
    """Draw the training facts by memory level; RUN/selection.jsonl lists them."""
    assert recipe.select is not None and recipe.select.balance != "label"
    run = recipe.run_folder
    levels = read_levels(run, model_fingerprint=fingerprint_model(recipe.model.path))
    trainable = [level for level in levels if level.split == "train"]
    n = recipe.select.n
    if n == "all":
        n = sum(level.level in recipe.select.levels for level in trainable)
    chosen = select_facts(
        trainable,
        levels_wanted=recipe.select.levels,
        n=n,
        balance=recipe.select.balance,
        seed=recipe.seed,
        draw=recipe.select.draw,
    )
    _write_selection(run, [level.to_row() for level in chosen])
    return chosen


def _write_selection(run: Path, rows: list[dict[str, Any]]) -> None:
    path = run / "selection.jsonl"
    if not path.is_file() or read_jsonl(path) != rows:
        write_jsonl(path, rows)


def probe(recipe: Recipe, *, merge_only: bool = False) -> list[FactLevel]:
    """Measure the memory levels of all facts of the recipe; RUN/levels.jsonl.

    Args:
        merge_only: everything has been measured by `probe_share`.
    """
    with open_run(recipe, purpose="probing") as run:
        started = time.perf_counter()
        levels = probe_facts(
            _probe(recipe, run), lambda: load_for_decoding(recipe.model), run=run, merge_only=merge_only
        )
        record_seconds(run, "probe", time.perf_counter() - started)
        return levels


def probe_share(recipe: Recipe, shard: str, *, is_alone: bool) -> str:
    """Measure the batches of one job of an array; says what was done.

    Args:
        shard: "i/N", i from 0.
        is_alone: `--merge` was not given.

    Raises:
        UserInputError: not of that form, or not alone.
    """
    job, num_jobs = _share(shard)
    if not is_alone:
        raise UserInputError(Problem(what="--merge needs all shards", where="--shard", got=shard))
    with open_run(recipe, purpose="probing a shard", shared=True) as run:
        folder = run / SHARDS / f"{job}-of-{num_jobs}"
        with folder_lock(folder, purpose="probing this shard"):
            mine, total = probe_shard(
                _probe(recipe, run),
                lambda: load_for_decoding(recipe.model),
                folder=folder,
                job=job,
                num_jobs=num_jobs,
            )
    return f"shard {shard}: {mine} of {total} batches are done; then: sftcore probe RECIPE --merge"


def _probe(recipe: Recipe, run: Path) -> Probe:
    relations = recipe.data.relations
    return Probe.of(
        _records(recipe, run, *SPLITS),
        _tokenizer(recipe),
        recipe.probe,
        seed=recipe.seed,
        model_fingerprint=fingerprint_model(recipe.model.path),
        relations=Path(relations) if relations else None,
    )


def describe_levels(levels: list[FactLevel]) -> str:
    """A small table: facts per level and split."""
    lines = ["split   " + "".join(f"{f'level {level}':>10}" for level in range(5)) + f"{'n':>10}"]
    for split in SPLITS:
        counts = level_counts([level for level in levels if level.split == split])
        total = sum(counts.values())
        if total:
            lines.append(
                f"{split:<8}" + "".join(f"{counts[level]:>10}" for level in range(5)) + f"{total:>10}"
            )
    return "\n".join(lines)


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
            found = load_records(recipe, "train", Ledger())
            examples = choose_examples(found, recipe.evaluate.few_shot, seed=recipe.seed)
            scores["fewshot"] = _evaluate_one(items, "fewshot", recipe.model.path, examples)
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
    tokenizer = _tokenizer(recipe)
    records = _records(recipe, run, "test", "ood")
    if not records:
        raise UserInputError(
            Problem(what="nothing to evaluate on", where="data.test", remedy="give held-out sources there")
        )
    levels = _known_levels(recipe, run)
    return _Items(recipe=recipe, run=run, tokenizer=tokenizer, records=records, levels=levels)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    model = recipe.model
    return load_tokenizer(model.path, model.trust_remote_code, add_tokens=model.add_tokens)


def _records(recipe: Recipe, run: Path, *splits: str) -> list[Record]:
    """Usable records of some splits; what is rejected on the way is listed in RUN/ledger.SPLIT.jsonl."""
    records = []
    for split in splits:
        ledger = Ledger()
        found = load_records(recipe, split, ledger)
        records += found if recipe.data.trivial_facts == "keep" else without_trivial(found, ledger)
        ledger.write(run / f"ledger.{split}.jsonl")
    return records


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
