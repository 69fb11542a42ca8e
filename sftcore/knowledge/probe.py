"""The probe: facts + a base model -> hits and trials of each fact, hence its memory level.

In: facts, a model and its tokenizer, the recipe's probe settings. Out: RUN/levels.jsonl, levels.manifest.json
(whose model, which settings) and levels.templates.json (hits of each wording).
Invariant: a hit is a completion that contains an answer or an alias, counted on the text alone; sampling is
seeded by (prompt, sample) and batches are a function of the facts, so a probe that was killed, or divided
into shards of whole batches, writes the same files.
Trade-off: a completion ends as soon as no continuation could undo its hit; with 20 % hits that spares about
a tenth of the decoding, and nothing is lost, for only yes or no is recorded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftcore.config import ProbeSettings
from sftcore.data.records import Record
from sftcore.data.tokens import Codec, codec_of
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import fingerprint_of, write_json, write_jsonl
from sftcore.generate.api import Decoding, Generator, Ids, IsDone, Reply, Scorer, batches_by_length
from sftcore.generate.vllm import seed_of
from sftcore.knowledge.containment import AliasTable, AnswerMatcher
from sftcore.knowledge.level_files import (
    LEVELS_BY_TEMPLATE,
    LEVELS_FILE,
    LEVELS_MANIFEST,
    is_probed,
    read_levels,
)
from sftcore.knowledge.levels import CODE_VERSION, FactLevel
from sftcore.knowledge.likelihood import accepted_names, answer_likelihoods
from sftcore.knowledge.questions import Question, Trial, distinct_questions, fact_of, make_trials
from sftcore.knowledge.templates import Relation, load_relations
from sftcore.log import progress
from sftcore.shares import SHARDS, Partial, Share, partials

log = logging.getLogger(__name__)
PARTIAL = "levels.partial.jsonl"
Loader = Callable[[], Any]  # a generator; a scorer, where likelihoods are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe measures; none of it needs the model's weights.

    Args:
        records: the facts.
        tokenizer: the model's.
        settings: the recipe's.
        seed: of the sampling.
        model_fingerprint: whose memory it is.
        dtype: in which the model is held.
        relations: by id; the shipped ones, and those of a file, as `load_relations` has them.

    Raises:
        UserInputError: a record is not a fact, or its relation has too few templates.
    """

    records: Sequence[Record]
    tokenizer: Any
    settings: ProbeSettings
    seed: int
    model_fingerprint: str
    dtype: str
    relations: Mapping[str, Relation] = field(default_factory=load_relations)

    def __post_init__(self) -> None:
        self.trials()  # refuses what has none

    def trials(self) -> list[Trial]:
        """Every fact in every wording."""
        return make_trials(self.records, self.settings.templates, self.relations)

    def manifest(self) -> dict[str, Any]:
        """What levels depend on; two probes with equal manifests give equal levels."""
        facts = [(record, fact_of(record)) for record in self.records]
        rows = [[r.id, r.split, fact.relation, fact.subject, list(fact.answers)] for r, fact in facts]
        backend = {"backend": "vllm"} if self.settings.backend == "vllm" else {}
        return {
            **backend,
            "code": CODE_VERSION,
            "aliases_fingerprint": AliasTable.load().fingerprint(),
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "estimator": self.settings.estimator,
            "templates": self.settings.templates,
            "samples": self.settings.samples,
            "temperature": self.settings.temperature,
            "max_new_tokens": self.settings.max_new_tokens,
            "batch_rows": self.settings.batch_rows,
            "seed": self.seed,
            "num_facts": len(self.records),
            "facts_fingerprint": fingerprint_of(rows),
            "templates_fingerprint": fingerprint_of([trial.prompt for trial in self.trials()]),
        }


def probe_facts(probe: Probe, load_model: Loader, *, run: Path, merge_only: bool = False) -> list[FactLevel]:
    """Probe every fact; levels.jsonl appears whole at the end, until then levels.partial.jsonl grows.

    Args:
        load_model: a generator (see sftcore.generate); called only if there is something left to measure.
        run: where the files go; batches that shards have done (`probe_shard`) are found there.
        merge_only: measure nothing: all shards must have been done.

    Raises:
        UserInputError: `merge_only`, and batches are missing.
    """
    manifest = probe.manifest()
    if is_probed(run, manifest):
        log.info("memory levels are already in %s", run / LEVELS_FILE)
        return read_levels(run, model_fingerprint=probe.model_fingerprint, dtype=probe.dtype)
    prober = Prober.of(probe)
    done = _done(row for partial in partials(run, PARTIAL, manifest) for row in partial.rows())
    left = [number for number in range(len(prober.batches)) if number not in done]
    if left and merge_only:
        raise UserInputError(_missing(run, left, len(prober.batches)))
    done |= prober.measure(left, load_model, Partial(run / PARTIAL, manifest), num_done=len(done))
    levels = _write_levels(run, probe, prober.collect(done), manifest)
    for partial in partials(run, PARTIAL, manifest):
        partial.file.unlink()
    return levels


def probe_shard(probe: Probe, load_model: Loader, *, run: Path, share: Share) -> tuple[int, int]:
    """Measure one job's share of the batches, in RUN/shards; goes on after a kill.

    Returns:
        number of batches that this shard has done, and of all batches.
    """
    prober = Prober.of(probe)
    partial = Partial(share.folder(run) / PARTIAL, probe.manifest())
    mine = share.of(range(len(prober.batches)))
    done = _done(partial.start())
    left = [number for number in mine if number not in done]
    prober.measure(left, load_model, partial, num_done=len(mine) - len(left))
    return len(mine), len(prober.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prober:
    """What all batches of a probe share.

    Args:
        probe: what is measured.
        trials: all facts in all wordings.
        questions: the distinct prompts.
        codec: the tokenizer's.
        prompts: their token ids.
        matchers: one per fact.
        batches: question numbers, batch by batch.
    """

    probe: Probe
    trials: Sequence[Trial]
    questions: Sequence[Question]
    codec: Codec
    prompts: Sequence[Sequence[int]]
    matchers: Sequence[AnswerMatcher]
    batches: Sequence[Sequence[int]]

    @classmethod
    def of(cls, probe: Probe) -> Prober:
        """Tokenise the prompts and cut them into batches."""
        trials = probe.trials()
        questions = distinct_questions(trials)
        codec = codec_of(probe.tokenizer)
        prompts = codec.encode_prompts([question.prompt for question in questions])
        aliases = AliasTable.load()
        per_batch = max(1, probe.settings.batch_rows // probe.settings.samples)
        return cls(
            probe=probe,
            trials=trials,
            questions=questions,
            codec=codec,
            prompts=prompts,
            matchers=[AnswerMatcher(fact_of(record).answers, aliases) for record in probe.records],
            batches=batches_by_length(prompts, prompts_per_batch=per_batch),
        )

    def measure(
        self,
        numbers: Sequence[int],
        load_model: Loader,
        partial: Partial,
        *,
        num_done: int,
    ) -> dict[int, list[float]]:
        """Hits of the trials of some batches; each batch is appended to `partial` when it is done."""
        if not numbers:
            return {}
        partial.start()
        generator, done = load_model(), {}
        hits_of = self.count_hits if self.probe.settings.estimator == "sampling" else self.expect_hits
        with progress("probing (batches)", num_done + len(numbers)) as advance:
            advance(num_done)
            for number in numbers:
                done[number] = hits_of(generator, self.batches[number])
                partial.append({"batch": number, "hits": done[number]})
                advance(1)
        return done

    def collect(self, done: Mapping[int, Sequence[float]]) -> np.ndarray:
        """(num_trials,) float64 hits, from those of all batches."""
        hits = np.zeros(len(self.trials))
        for number, batch in enumerate(self.batches):
            hits[self.trials_of(batch)] = done[number]
        return hits

    def trials_of(self, batch: Sequence[int]) -> list[int]:
        """Trial numbers of a batch's questions, question by question."""
        return [trial for i in batch for trial in self.questions[i].trials]

    def count_hits(self, generator: Generator[Ids, Reply], batch: Sequence[int]) -> list[float]:
        """Hits of each trial of one batch, by all its completions."""
        decode = self.probe.tokenizer.batch_decode
        matchers = [[self.matchers[self.trials[t].fact] for t in self.questions[i].trials] for i in batch]

        def are_settled(places: Sequence[int], tokens: Sequence[list[int]]) -> list[bool]:
            texts = decode(list(tokens), skip_special_tokens=True)
            return [
                all(matcher.is_settled(text) for matcher in matchers[place])
                for place, text in zip(places, texts, strict=True)
            ]

        decoding = self._decoding(batch, are_settled)
        replies = generator.complete([self.prompts[i] for i in batch], decoding)
        return [
            sum(matcher.matches(reply.text) for reply in replies[place])
            for place in range(len(batch))
            for matcher in matchers[place]
        ]

    def expect_hits(self, scorer: Scorer, batch: Sequence[int]) -> list[float]:
        """Expected hits of each trial of one batch, from the likelihood of its answers."""
        aliases = AliasTable.load()
        trials = self.trials_of(batch)
        likelihoods = answer_likelihoods(
            scorer,
            self.codec,
            [self.trials[t].prompt for t in trials],
            [accepted_names(fact_of(self.probe.records[self.trials[t].fact]), aliases) for t in trials],
            temperature=self.probe.settings.temperature,
            max_new_tokens=self.probe.settings.max_new_tokens,
        )
        return [likelihood * self.probe.settings.samples for likelihood in likelihoods]

    def _decoding(self, batch: Sequence[int], is_done: IsDone) -> Decoding:
        """How a batch is completed; its draws follow from the prompts' texts."""
        seed, settings = self.probe.seed, self.probe.settings
        prompts = [self.questions[i].prompt for i in batch]
        decoding = Decoding(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            completions_per_prompt=settings.samples,
            is_done=is_done,
        )
        if settings.backend == "vllm":
            return replace(decoding, seeds=[seed_of(seed, prompt) for prompt in prompts])
        pairs = [(prompt, sample) for prompt in prompts for sample in range(settings.samples)]
        uniforms = [uniforms_of(seed, *pair, count=settings.max_new_tokens) for pair in pairs]
        return replace(decoding, uniforms=np.stack(uniforms))


def uniforms_of(seed: int, prompt: str, sample: int, *, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1): the random numbers of one completion, the same wherever it is drawn.

    A prompt stands for its fact and template; facts that share it share its completions.
    """
    digest = hashlib.sha256(f"{seed}\0{prompt}\0{sample}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(count)


def _write_levels(run: Path, probe: Probe, hits: np.ndarray, manifest: dict[str, Any]) -> list[FactLevel]:
    """levels.jsonl and levels.templates.json, then the manifest that vouches for them."""
    settings = probe.settings
    per_fact = hits.reshape(len(probe.records), settings.templates)
    counts = np.rint(per_fact.sum(1)).astype(int).tolist()
    levels = [
        _fact_level(record, count, settings.templates * settings.samples)
        for record, count in zip(probe.records, counts, strict=True)
    ]
    (run / LEVELS_MANIFEST).unlink(missing_ok=True)
    write_jsonl(run / LEVELS_FILE, (level.to_row() for level in levels))
    relations = np.array([level.relation for level in levels])
    by_template = {name: per_fact[relations == name].sum(0).tolist() for name in dict.fromkeys(relations)}
    write_json(run / LEVELS_BY_TEMPLATE, {str(name): found for name, found in by_template.items()})
    write_json(run / LEVELS_MANIFEST, manifest)
    return levels


def _fact_level(record: Record, hits: int, trials: int) -> FactLevel:
    fact = fact_of(record)
    return FactLevel(
        id=record.id,
        split=record.split,
        relation=fact.relation,
        subject=fact.subject,
        answers=fact.answers,
        hits=hits,
        trials=trials,
    )


def _done(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[float]]:
    """Hits of finished batches, by the batch's number."""
    return {row["batch"]: row["hits"] for row in rows}


def _missing(run: Path, left: Sequence[int], num_batches: int) -> Problem:
    return Problem(
        what=f"{len(left)} of {num_batches} batches were not probed yet (such as number {left[0]})",
        where=str(run / SHARDS),
        remedy="let every shard finish under this recipe, or measure the rest here: sftcore probe RECIPE",
    )
