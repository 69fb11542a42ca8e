"""The probe: facts + a base model -> hits and trials of each fact, hence its memory level.

In: facts, a model and its tokenizer, the recipe's probe settings. Out: RUN/levels.jsonl and
levels.manifest.json (whose model, which settings).
Invariant: a hit is a completion that contains an answer or an alias, counted on the text alone; sampling is
seeded by (fact, template, sample) and batches are a function of the facts, so a killed and resumed probe
writes the same file.
Trade-off: a completion ends as soon as no continuation could undo its hit; with 20 % hits that spares about
a tenth of the decoding, and nothing is lost, for only yes or no is recorded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sftcore.config import ProbeSettings
from sftcore.data.contents import Fact
from sftcore.data.records import Record
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import (
    append_jsonl,
    fingerprint_of,
    read_json,
    read_jsonl,
    sha256_of_file,
    write_json,
    write_jsonl,
)
from sftcore.knowledge.containment import AliasTable, AnswerMatcher
from sftcore.knowledge.levels import FactLevel
from sftcore.knowledge.templates import completion_prompts, find_relation, load_relations
from sftcore.log import progress
from sftcore.model.generate import Sampling, batches_by_length, decode_batch, stop_ids

log = logging.getLogger(__name__)
LEVELS, MANIFEST, PARTIAL = "levels.jsonl", "levels.manifest.json", "levels.partial.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One prompt of one fact: `samples` completions are drawn from it."""

    fact: int
    template: int
    prompt: str


def probe_facts(
    records: Sequence[Record],
    model: PreTrainedModel,
    tokenizer: Any,
    settings: ProbeSettings,
    *,
    seed: int,
    run: Path,
    model_fingerprint: str,
) -> list[FactLevel]:
    """Probe every fact; levels.jsonl appears whole at the end, until then levels.partial.jsonl grows.

    Raises:
        UserInputError: a record is not a fact, or its relation has no completion templates.
    """
    manifest = probe_manifest(records, settings, seed=seed, model_fingerprint=model_fingerprint)
    if is_probed(run, manifest):
        log.info("memory levels are already in %s", run / LEVELS)
        return read_levels(run, model_fingerprint=model_fingerprint)
    trials = make_trials(records, settings)
    aliases = AliasTable.load()
    prober = Prober(
        model=model,
        tokenizer=tokenizer,
        settings=settings,
        seed=seed,
        records=records,
        matchers=[AnswerMatcher(_fact_of(record).answers, aliases) for record in records],
        trials=trials,
        prompts=[tokenizer(trial.prompt)["input_ids"] for trial in trials],
    )
    hits = prober.count_hits(run / PARTIAL, manifest).tolist()
    num_trials = settings.templates * settings.samples
    levels = [_fact_level(record, hit, num_trials) for record, hit in zip(records, hits, strict=True)]
    write_jsonl(run / LEVELS, (level.to_row() for level in levels))
    write_json(run / MANIFEST, manifest)
    (run / PARTIAL).unlink(missing_ok=True)
    return levels


def probe_manifest(
    records: Sequence[Record], settings: ProbeSettings, *, seed: int, model_fingerprint: str
) -> dict[str, Any]:
    """What levels depend on; two probes with equal manifests give equal levels."""
    return {
        "model_fingerprint": model_fingerprint,
        "templates": settings.templates,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "batch_rows": settings.batch_rows,
        "seed": seed,
        "num_facts": len(records),
        "facts_fingerprint": fingerprint_of([_fact_row(record) for record in records]),
        "templates_fingerprint": fingerprint_of([trial.prompt for trial in make_trials(records, settings)]),
    }


def is_probed(run: Path, manifest: dict[str, Any]) -> bool:
    """Whether the run folder holds levels made from exactly these inputs."""
    return (run / MANIFEST).is_file() and (run / LEVELS).is_file() and read_json(run / MANIFEST) == manifest


def read_levels(run: Path, *, model_fingerprint: str) -> list[FactLevel]:
    """Levels of a run folder.

    Raises:
        UserInputError: there are none, or they are another model's.
    """
    if not ((run / LEVELS).is_file() and (run / MANIFEST).is_file()):
        raise UserInputError(
            Problem(what="no memory levels yet", where=str(run), remedy="run: sftcore probe RECIPE")
        )
    found = read_json(run / MANIFEST)["model_fingerprint"]
    if found != model_fingerprint:
        raise UserInputError(
            Problem(
                what="these memory levels belong to another model",
                where=str(run / LEVELS),
                got=found,
                allowed=model_fingerprint,
                remedy="sftcore probe RECIPE (with another --run to keep the old levels)",
            )
        )
    return [FactLevel.from_row(row) for row in read_jsonl(run / LEVELS)]


def fingerprint_model(path: str) -> str:
    """Identity of a model or adapter folder: its configuration and weights; a hub name stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    configs = [f for f in (folder / "config.json", folder / "adapter_config.json") if f.is_file()]
    files = sorted([*configs, *folder.glob("*.safetensors")])
    return fingerprint_of({file.name: sha256_of_file(file) for file in files})


def make_trials(records: Sequence[Record], settings: ProbeSettings) -> list[Trial]:
    """All prompts, fact by fact, template by template.

    Raises:
        UserInputError: a record is not a fact, or its relation has too few templates.
    """
    relations = load_relations()
    trials = []
    for number, record in enumerate(records):
        fact = _fact_of(record)
        relation = find_relation(relations, fact.relation)
        prompts = completion_prompts(relation, fact.subject, settings.templates)
        trials += [Trial(fact=number, template=t, prompt=prompt) for t, prompt in enumerate(prompts)]
    return trials


def _fact_of(record: Record) -> Fact:
    if not isinstance(record.content, Fact):
        raise UserInputError(
            Problem(
                what="only facts can be probed",
                where=f"{record.file}:{record.row}",
                remedy="use format entityquestions or facts",
            )
        )
    return record.content


def _fact_row(record: Record) -> list[Any]:
    fact = _fact_of(record)
    return [record.id, record.split, fact.relation, fact.subject, list(fact.answers)]


def _fact_level(record: Record, hits: int, trials: int) -> FactLevel:
    fact = _fact_of(record)
    return FactLevel(
        id=record.id,
        split=record.split,
        relation=fact.relation,
        subject=fact.subject,
        answers=fact.answers,
        hits=hits,
        trials=trials,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prober:
    """What all batches of a probe share.

    Args:
        records: the facts.
        matchers: one per fact.
        trials: all prompts, fact by fact.
        prompts: their token ids.
    """

    model: PreTrainedModel
    tokenizer: Any
    settings: ProbeSettings
    seed: int
    records: Sequence[Record]
    matchers: Sequence[AnswerMatcher]
    trials: Sequence[Trial]
    prompts: Sequence[Sequence[int]]

    def count_hits(self, partial: Path, manifest: dict[str, Any]) -> np.ndarray:
        """(num_facts,) int64; goes on from the batches that `partial` holds."""
        per_batch = max(1, self.settings.batch_rows // self.settings.samples)
        batches = batches_by_length(self.prompts, prompts_per_batch=per_batch)
        hits = np.zeros(len(self.records), np.int64)
        done = _read_partial(partial, manifest)
        for row in done:
            np.add.at(hits, row["facts"], row["hits"])
        with progress("probing (prompts)", len(self.trials)) as advance:
            advance(sum(len(batch) for batch in batches[: len(done)]))
            for batch in batches[len(done) :]:
                facts, counts = [self.trials[i].fact for i in batch], self.hits_of(batch)
                np.add.at(hits, facts, counts)
                append_jsonl(partial, {"facts": facts, "hits": counts})
                advance(len(batch))
        return hits

    def hits_of(self, batch: Sequence[int]) -> list[int]:
        """Hits of each trial of one batch, by decoding all its completions."""
        n = self.settings.samples
        matchers = [self.matchers[self.trials[i].fact] for i in batch for _ in range(n)]

        def is_settled(row: int, tokens: list[int]) -> bool:
            return matchers[row].is_settled(self.tokenizer.decode(tokens, skip_special_tokens=True))

        completions = decode_batch(
            self.model,
            [self.prompts[i] for i in batch],
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=stop_ids(self.model, self.tokenizer),
            completions_per_prompt=n,
            sampling=Sampling(temperature=self.settings.temperature, uniforms=self._uniforms(batch)),
            is_done=is_settled,
        )
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        found = [matcher.matches(text) for matcher, text in zip(matchers, texts, strict=True)]
        return [sum(found[i : i + n]) for i in range(0, len(found), n)]

    def _uniforms(self, batch: Sequence[int]) -> np.ndarray:
        """(completions of the batch, max_new_tokens)."""
        return np.stack(
            [
                uniforms_of(
                    self.seed,
                    self.records[self.trials[i].fact].id,
                    self.trials[i].template,
                    sample,
                    count=self.settings.max_new_tokens,
                )
                for i in batch
                for sample in range(self.settings.samples)
            ]
        )


def _read_partial(path: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches that an interrupted probe with the same manifest has done; starts the file otherwise."""
    rows = read_jsonl(path) if path.is_file() else []
    if rows and rows[0] == manifest:
        write_jsonl(path, rows)  # drops a torn last line, so that the next append starts on a new one
        return rows[1:]
    write_jsonl(path, [manifest])
    return []


def uniforms_of(seed: int, fact_id: str, template: int, sample: int, *, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the random numbers of one completion, the same wherever it is drawn."""
    digest = hashlib.sha256(f"{seed}\0{fact_id}\0{template}\0{sample}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(count)
