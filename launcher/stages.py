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
from pathlib import Path
from typing import Any

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
from sftcore.evaluate.generate import predict
from sftcore.evaluate.pairs import judge_pairs, pair_rows, pair_scores
from sftcore.evaluate.score import score
from sftcore.fsio import atomic_file, fingerprint_of, read_json, read_jsonl, write_json, write_jsonl
from sftcore.knowledge.levels import FactLevel, level_counts
from sftcore.knowledge.probe import fingerprint_model, probe_facts, read_levels
from sftcore.knowledge.selection import select_facts
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
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserInputError(
            Problem(
                what="a share is i/N with i from 0 to N-1", where="--shard", got=shard, allowed="0/4 to 3/4"
            )
        )
    if not is_alone:
        raise UserInputError(Problem(what="--merge and --check need all shards", where="--shard", got=shard))
    job, num_jobs = int(match[1]), int(match[2])
    mine, total = prepare_shard(
        recipe,
        _tokenizer(recipe),
        job=job,
        num_jobs=num_jobs,
        only_ids=_chosen(recipe),
        num_workers=num_workers,
    )
    return f"shard {shard}: {mine} of {total} parts are done; then: sftcore prepare RECIPE --merge"


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
    chosen = draw_pairs(records, settings.n, balance=settings.balance, seed=recipe.seed, draw=settings.draw)
    rows = [{"id": r.id, "label": r.content.label} for r in chosen if isinstance(r.content, Pair)]
    _write_selection(recipe.run_folder, rows)
    return {record.id for record in chosen}


def select(recipe: Recipe) -> list[FactLevel]:
    """Draw the training facts by memory level; RUN/selection.jsonl lists them."""
    assert recipe.select is not None and recipe.select.balance != "label"
    run = recipe.run_folder
    levels = read_levels(run, model_fingerprint=fingerprint_model(recipe.model.path))
    chosen = select_facts(
        [level for level in levels if level.split == "train"],
        levels_wanted=recipe.select.levels,
        n=recipe.select.n,
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


def probe(recipe: Recipe) -> list[FactLevel]:
    """Measure the memory levels of all facts of the recipe; RUN/levels.jsonl."""
    with open_run(recipe, purpose="probing") as run:
        started = time.perf_counter()
        tokenizer = _tokenizer(recipe)
        records = _records(recipe, run, *SPLITS)
        levels = probe_facts(
            records,
            load_for_decoding(recipe.model),
            tokenizer,
            recipe.probe,
            seed=recipe.seed,
            run=run,
            model_fingerprint=fingerprint_model(recipe.model.path),
        )
        record_seconds(run, "probe", time.perf_counter() - started)
        return levels


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
        scores by name: base, tuned, or the folder name of `model`.

    Raises:
        UserInputError: the recipe has no held-out data, or there is no such model.
    """
    with open_run(recipe, purpose="evaluation") as run:
        folders = _models_to_evaluate(recipe, model)
        tokenizer = _tokenizer(recipe)
        records = _records(recipe, run, "test", "ood")
        if not records:
            raise UserInputError(
                Problem(
                    what="nothing to evaluate on", where="data.test", remedy="give held-out sources there"
                )
            )
        levels = _known_levels(recipe, run)
        return {
            name: _evaluate_one(recipe, run, name, folder, tokenizer, records, levels)
            for name, folder in folders.items()
        }


def _tokenizer(recipe: Recipe) -> Tokenizer:
    model = recipe.model
    return load_tokenizer(model.path, model.trust_remote_code, add_tokens=model.add_tokens)


def _records(recipe: Recipe, run: Path, *splits: str) -> list[Record]:
    """Usable records of some splits; what is rejected on the way is listed in RUN/ledger.SPLIT.jsonl."""
    records = []
    for split in splits:
        ledger = Ledger()
        records += load_records(recipe, split, ledger)
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


def _evaluate_one(
    recipe: Recipe,
    run: Path,
    name: str,
    folder: str,
    tokenizer: Tokenizer,
    records: list[Record],
    levels: dict[str, int],
) -> dict[str, Any]:
    """Predictions and scores of one model; found again if model, items, prompts and settings are the same."""
    prompter = Prompter(PromptOptions.of(recipe), tokenizer)
    target = run / "eval" / name
    manifest = {
        "model_fingerprint": fingerprint_model(folder),
        "prompts_fingerprint": fingerprint_of(
            [[r.id, r.split, ids] for r, ids in zip(records, prompter.prompt_ids_batch(records), strict=True)]
        ),
        "levels_fingerprint": fingerprint_of(levels),
        "settings": recipe.evaluate.model_dump(),
    }
    if recipe.task == "matching":
        manifest["matching"] = recipe.matching.model_dump(mode="json")
    if (target / "manifest.json").is_file() and read_json(target / "manifest.json") == manifest:
        log.info("%s: already evaluated in %s", name, target)
        return dict(read_json(target / "scores.json"))
    log.info("evaluating %s (%s) on %d items", name, folder, len(records))
    started = time.perf_counter()
    rows, scores = _predict_and_score(recipe, folder, prompter, records, levels)
    (target / "manifest.json").unlink(missing_ok=True)
    write_jsonl(target / "predictions.jsonl", rows)
    write_json(target / "scores.json", scores)
    write_json(target / "manifest.json", manifest)
    record_seconds(run, f"evaluate_{name}", time.perf_counter() - started)
    return scores


def _predict_and_score(
    recipe: Recipe, folder: str, prompter: Prompter, records: list[Record], levels: dict[str, int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The content of predictions.jsonl and of scores.json."""
    quantised = recipe.adapter.kind == "qlora" and is_adapter(Path(folder))
    if recipe.task == "matching":
        verdicts = judge_pairs(recipe, folder, records, prompter, quantised=quantised)
        rows = pair_rows(records, verdicts, prompter)
        return rows, score(rows) | {"pairs": pair_scores(records, verdicts)}
    loaded = load_for_decoding(recipe.model.model_copy(update={"path": folder}), quantised=quantised)
    rows = predict(records, loaded, prompter.codec.tokenizer, prompter, recipe.evaluate, levels=levels)
    return rows, score(rows)
