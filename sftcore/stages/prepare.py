"""The stages before training on one machine: prepare, probe, select.

In: a resolved recipe. Out: a token store; RUN/levels.jsonl, selection.jsonl, ledger.jsonl.
Invariant: a stage whose inputs have not changed finds its files and does nothing.
Trade-off: stages hand over through files, not objects, so each can be run, killed and looked at alone.
Reading them again costs under a second; comparing levels with the data files as they are now reads these
too, 10 s for 176,000 facts (two-core machine, November 2026).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftcore.amounts import counted
from sftcore.config import Recipe, SelectSettings
from sftcore.data.check import check_store, check_text, draw_check
from sftcore.data.draws import draw_selected
from sftcore.data.ledger import TRIVIAL, Ledger
from sftcore.data.prepare import load_records, prepare_shard, prepare_store
from sftcore.data.records import Record
from sftcore.data.selection_file import write_selection
from sftcore.data.splits import with_valid_as_train
from sftcore.data.store import TokenStore
from sftcore.data.tokens import Tokenizer, load_tokenizer
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import (
    atomic_file,
    folder_lock,
    write_json,
)
from sftcore.generate.own import OwnGenerator
from sftcore.generate.vllm import VllmGenerator, load_vllm
from sftcore.knowledge.level_files import LEVELS_FILE, check_same_facts, holds_levels, is_probed, read_levels
from sftcore.knowledge.levels import FactLevel, level_counts
from sftcore.knowledge.permute import num_kept, permuted_answers
from sftcore.knowledge.probe import Probe, probe_facts, probe_shard
from sftcore.knowledge.selection import select_facts
from sftcore.knowledge.templates import load_relations
from sftcore.model.identity import fingerprint_model
from sftcore.model.load import load_for_decoding
from sftcore.precision import dtype_of
from sftcore.runs.claim import open_run, record_seconds
from sftcore.shares import Share, share_done
from sftcore.tasks import TASKS

log = logging.getLogger("sftcore.stages")
MEASURED = ("train", "test", "ood")
Selection = dict[str, tuple[str, ...] | None]  # id -> other answers to train


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
    tokenizer = recipe_tokenizer(recipe)
    store = prepare_store(
        recipe, tokenizer, only_ids=_chosen(recipe), num_workers=num_workers, merge_only=merge_only
    )
    return tokenizer, store


def prepare_valid(recipe: Recipe, tokenizer: Tokenizer) -> TokenStore:
    """The token store of data.valid."""
    return prepare_store(with_valid_as_train(recipe), tokenizer)


def prepare_share(recipe: Recipe, share: Share, *, num_workers: int | None) -> str:
    """Make the parts of one job of an array; says what was done."""
    mine, total = prepare_shard(
        recipe, recipe_tokenizer(recipe), share, only_ids=_chosen(recipe), num_workers=num_workers
    )
    return share_done(share, f"{mine} of {total} parts are done", command="prepare")


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


def _chosen(recipe: Recipe) -> Selection | None:
    return None if recipe.select is None else select(recipe)


def select(recipe: Recipe) -> Selection:
    """Draw the records that are trained on; RUN/selection.jsonl lists them.

    Returns:
        by id, the answers that are trained, None where they are the record's own.

    Raises:
        UserInputError: the recipe selects nothing; or no levels yet, those of another model or of other
            facts, or too few of them.
    """
    if recipe.select is None:
        remedy = "give it, such as select: {levels: [2], n: 60}; without it all records are trained on"
        raise UserInputError(Problem(what="nothing to select by", where="select", remedy=remedy))
    return CHOOSE[TASKS[recipe.task].selects_by](recipe)


def _draw(recipe: Recipe) -> Selection:
    """Draw training pairs, balanced over labels if so asked; RUN/selection.jsonl lists them."""
    records = load_records(recipe, "train", Ledger())
    chosen = draw_selected(records, recipe.select, seed=recipe.seed)
    if len(chosen) < len(records):
        log.info("select: %d of %d pairs", len(chosen), len(records))
    rows = [{"id": record.id, "label": record.content.gold} for record in chosen]
    write_selection(recipe.run_folder, rows)
    return dict.fromkeys(record.id for record in chosen)


def select_by_level(recipe: Recipe) -> list[FactLevel]:
    """Draw training facts by memory level; RUN/selection.jsonl lists them.

    Raises:
        UserInputError: as `select`.
    """
    assert recipe.select is not None and recipe.select.balance != "label"
    run = recipe.run_folder
    fingerprint, dtype = fingerprint_model(recipe.model.path), dtype_of(recipe.model)
    levels = read_levels(run, model_fingerprint=fingerprint, dtype=dtype)
    trainable = [level for level in levels if level.split == "train"]
    check_same_facts(trainable, load_records(recipe, "train", Ledger()), where=run / LEVELS_FILE)
    chosen = select_facts(
        trainable,
        levels_wanted=recipe.select.levels,
        n=recipe.select.n,
        balance=recipe.select.balance,
        seed=recipe.seed,
        draw=recipe.select.draw,
    )
    _tell_levels(recipe.select.levels, chosen)
    if recipe.select.answers == "permuted":
        chosen = _permuted(recipe.select, chosen, seed=recipe.seed)
    write_selection(run, [level.to_row() for level in chosen])
    return chosen


def _permuted(settings: SelectSettings, chosen: list[FactLevel], *, seed: int) -> list[FactLevel]:
    """The control: the chosen facts with each other's answers, relation by relation."""
    permuted = permuted_answers(chosen, seed=seed, draw=settings.draw)
    kept = num_kept(chosen, permuted)
    log.info("select: answers are permuted within relations; %s keep an equal one", counted(kept, "fact"))
    return permuted


def _by_level(recipe: Recipe) -> Selection:
    are_own = recipe.select is not None and recipe.select.answers == "own"
    return {fact.id: None if are_own else fact.answers for fact in select_by_level(recipe)}


CHOOSE: dict[str, Callable[[Recipe], Selection]] = {"levels": _by_level, "labels": _draw}  # by `selects_by`


def _tell_levels(wanted: list[int], chosen: list[FactLevel]) -> None:
    """How many facts of each wanted level were drawn."""
    counts = level_counts(chosen)
    drawn = ", ".join(f"level {level}: {counts[level]}" for level in sorted(set(wanted)))
    log.info("select: %s (%s)", counted(len(chosen), "fact"), drawn)
    if missing := [str(level) for level in sorted(set(wanted)) if not counts[level]]:
        log.warning("select.levels names level %s, of which no fact was drawn", ", ".join(missing))


def probe(recipe: Recipe, *, merge_only: bool = False) -> list[FactLevel]:
    """Measure the memory levels of all facts of the recipe; RUN/levels.jsonl.

    Args:
        merge_only: everything has been measured by `probe_share`.
    """
    with open_run(recipe, purpose="probing") as run:
        started = time.perf_counter()
        levels = probe_facts(
            _probe(recipe, run), lambda: _load_for_probe(recipe), run=run, merge_only=merge_only
        )
        record_seconds(run, "probe", time.perf_counter() - started)
        return levels


def is_probed_now(recipe: Recipe) -> bool:
    """Whether the run folder holds the levels that a probe of today's model and facts would give."""
    run = recipe.run_folder
    return holds_levels(run) and is_probed(run, _probe(recipe, run).manifest())


def probe_share(recipe: Recipe, share: Share) -> str:
    """Measure the batches of one job of an array; says what was done."""
    with open_run(recipe, purpose="probing a shard", shared=True) as run:
        with folder_lock(share.folder(run), purpose="probing this shard"):
            mine, total = probe_shard(
                _probe(recipe, run), lambda: _load_for_probe(recipe), run=run, share=share
            )
    return share_done(share, f"{mine} of {total} batches are done", command="probe")


def _load_for_probe(recipe: Recipe) -> Any:
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.trust_remote_code)
    if recipe.probe.backend == "vllm":
        return VllmGenerator(load_vllm(recipe.model, recipe.probe, seed=recipe.seed), tokenizer)
    return OwnGenerator(load_for_decoding(recipe.model), tokenizer)


def _probe(recipe: Recipe, run: Path) -> Probe:
    relations = recipe.data.relations
    return Probe(
        records=usable_records(recipe, run, *MEASURED),
        tokenizer=recipe_tokenizer(recipe),
        settings=recipe.probe,
        seed=recipe.seed,
        model_fingerprint=fingerprint_model(recipe.model.path),
        dtype=dtype_of(recipe.model),
        relations=load_relations(Path(relations) if relations else None),
    )


def describe_levels(levels: list[FactLevel]) -> str:
    """A small table: facts per level and split."""
    lines = ["split   " + "".join(f"{f'level {level}':>10}" for level in range(5)) + f"{'n':>10}"]
    for split in MEASURED:
        counts = level_counts([level for level in levels if level.split == split])
        total = sum(counts.values())
        if total:
            lines.append(
                f"{split:<8}" + "".join(f"{counts[level]:>10}" for level in range(5)) + f"{total:>10}"
            )
    return "\n".join(lines)


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The model's tokenizer, with the recipe's added tokens."""
    model = recipe.model
    return load_tokenizer(
        model.path,
        model.trust_remote_code,
        add_tokens=model.add_tokens,
        chat_template=model.chat_template,
    )


def usable_records(
    recipe: Recipe,
    run: Path | None,
    *splits: str,
    fit: Callable[[list[Record], Ledger], list[Record]] | None = None,
) -> list[Record]:
    """Usable records of some splits; what is rejected on the way is listed in RUN/ledger.SPLIT.jsonl.

    Args:
        run: None: rejections are listed nowhere.
        fit: rejects what the model can't take.

    Raises:
        UserInputError: bad data; or all training facts are trivial.
    """
    records = []
    for split in splits:
        ledger, listed = Ledger(), None if run is None else run / f"ledger.{split}.jsonl"
        kept = load_records(recipe, split, ledger, is_measured=True)
        num_trivial = sum(ledger.rejected_by_reason[reason] for reason in TRIVIAL)
        records += fit(kept, ledger) if fit else kept
        if listed is not None:
            ledger.write(listed)
        if num_trivial:
            _tell_trivial(ledger, listed, split, num_left=len(kept))
    return records


def _tell_trivial(ledger: Ledger, listed: Path | None, split: str, *, num_left: int) -> None:
    """Say how many facts were left out as trivial, and why; refuse if none is left to train on."""
    counts = {reason: ledger.rejected_by_reason[reason] for reason in sorted(TRIVIAL)}
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
    if split == "train" and not num_left:
        what, remedy = "every training fact is trivial", "fix the facts, or set data.trivial_facts: keep"
        where = "data.train" if listed is None else str(listed)
        raise UserInputError(Problem(what=what, where=where, got=reasons, remedy=remedy))
    log.info("%s left out: %s (%s)", counted(sum(counts.values()), "fact"), reasons, listed or split)
