"""The probe's completions per second beside transformers' `generate(num_return_sequences=10)`.

    python -m benchmarks.probe speed --model .cache/models/smollm2-135m --rounds 3
    python -m benchmarks.probe recall --model .cache/models/smollm2-135m
    python -m benchmarks.probe greedy --model .cache/models/smollm2-135m
    python -m benchmarks.probe estimators --model .cache/models/smollm2-135m

speed: the paper's settings (temperature 0.7, 32 tokens, 10 samples a prompt), shipped facts, both in
`--dtype` (by default the one that `model.dtype: auto` takes here), in turn; both count hits, so decoding to
text and matching are in both times; wall time, and CPU time of all threads, which other jobs on the machine
disturb less (then with OMP_NUM_THREADS=1). recall: 500 facts x 2 templates x 10 samples by both; the
difference of the mean recalls beside its standard error. greedy: tokens of both in float32. estimators:
recall by sampling beside recall by likelihood, with CPU times. Each writes its part of
benchmarks/results/probe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import limits, peak_resident_bytes, versions
from sftcore.config import ModelSettings, ProbeSettings
from sftcore.data.contents import Fact
from sftcore.data.records import Record
from sftcore.data.tokens import load_tokenizer
from sftcore.fsio import read_json, read_jsonl, write_json
from sftcore.generate.api import Decoding, batches_by_length
from sftcore.generate.decode import decode_batch, stop_ids
from sftcore.generate.own import OwnGenerator
from sftcore.knowledge.probe import Probe, Prober
from sftcore.knowledge.templates import load_relations
from sftcore.model.load import load_for_decoding
from sftcore.precision import DTYPES, dtype_here

RESULTS = Path(__file__).parent / "results" / "probe.json"
FACTS = Path(__file__).parent.parent / "sftcore" / "assets" / "facts" / "train.jsonl"
SEED = 17


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["speed", "recall", "greedy", "estimators"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--facts", type=int, default=500, help="of recall and estimators")
    parser.add_argument("--prompts", type=int, default=128, help="of speed and greedy, 10 completions each")
    parser.add_argument("--rows", type=int, default=640, help="completions that ours draws together")
    parser.add_argument("--peer-rows", type=int, default=160, help="completions that generate draws together")
    parser.add_argument("--peer-attention", default="sdpa")
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype_here())
    options = parser.parse_args()
    measure = {"speed": speed, "recall": recall, "greedy": greedy, "estimators": estimators}[options.what]
    report = measure(options) | {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model.name,
        "dtype": options.dtype,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "limited_by": limits(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg(),
        "peak_resident_bytes": peak_resident_bytes(),
        "versions": versions("torch", "transformers", "numpy"),
    }
    print(json.dumps(report, indent=1))
    earlier = read_json(RESULTS) if RESULTS.is_file() else {}
    name = options.what if options.dtype == "bfloat16" else f"{options.what} in {options.dtype}"
    write_json(RESULTS, earlier | {name: report})


def facts(count: int) -> list[Record]:
    """`count` shipped facts, evenly spread."""
    rows = read_jsonl(FACTS)
    rows = [rows[i * len(rows) // count] for i in range(count)]
    contents = [Fact(relation=r["relation"], subject=r["subject"], answers=tuple(r["answers"])) for r in rows]
    return [
        Record(id=row["id"], split="train", file=FACTS.name, row=number, content=content)
        for number, (row, content) in enumerate(zip(rows, contents, strict=True), start=1)
    ]


def make_prober(options: argparse.Namespace, records: list[Record], **settings: Any) -> Prober:
    """Ours, at the paper's settings unless said otherwise."""
    tokenizer = load_tokenizer(str(options.model))
    chosen = ProbeSettings(batch_rows=options.rows, **settings)
    relations = load_relations()
    return Prober.of(
        Probe(
            records=records,
            tokenizer=tokenizer,
            settings=chosen,
            seed=SEED,
            model_fingerprint=options.model.name,
            dtype=options.dtype,
            relations=relations,
        )
    )


def load_ours(options: argparse.Namespace, dtype: str | None = None) -> Any:
    """The model as the probe has it."""
    settings = ModelSettings(path=str(options.model.resolve()), dtype=dtype or options.dtype)
    return load_for_decoding(settings)


def load_peer(options: argparse.Namespace, dtype: str | None = None) -> Any:
    """The model as `generate` has it."""
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=DTYPES[dtype or options.dtype], attn_implementation=options.peer_attention
    ).eval()


def generate_batch(model: Any, tokenizer: Any, texts: list[str], **how: Any) -> list[list[int]]:
    """Token ids of the completions, a prompt's side by side."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id, **how)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def peer_hits(model: Any, prober: Prober, questions: list[int], rows: int) -> np.ndarray:
    """(trials,) hits of the questions' trials by `generate`."""
    tokenizer, samples = prober.probe.tokenizer, prober.probe.settings.samples
    hits = np.zeros(len(prober.trials))
    how = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    prompts = [prober.prompts[i] for i in questions]
    for batch in batches_by_length(prompts, prompts_per_batch=rows // samples):
        chosen = [questions[place] for place in batch]
        tokens = generate_batch(model, tokenizer, [prober.questions[i].prompt for i in chosen], **how)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for place, question in enumerate(chosen):
            for trial in prober.questions[question].trials:
                matcher = prober.matchers[prober.trials[trial].fact]
                hits[trial] = sum(map(matcher.matches, texts[place * samples : (place + 1) * samples]))
    return hits


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Completions per second of both, in turn."""
    prober = make_prober(options, facts(options.prompts))
    chosen = [fact * 21 + fact % 21 for fact in range(options.prompts)]  # every fact in one wording, all used
    assert len({prober.questions[i].prompt for i in chosen}) == options.prompts
    prompts = [prober.prompts[i] for i in chosen]
    per_batch = options.rows // 10
    batches = [[chosen[p] for p in b] for b in batches_by_length(prompts, prompts_per_batch=per_batch)]
    generator, peer = OwnGenerator(load_ours(options), prober.probe.tokenizer), load_peer(options)
    prober.count_hits(generator, chosen[:2])
    peer_hits(peer, prober, chosen[:2], options.peer_rows)
    contestants: dict[str, Callable[[], float]] = {
        "ours": lambda: sum(sum(prober.count_hits(generator, batch)) for batch in batches),
        "generate": lambda: float(peer_hits(peer, prober, chosen, options.peer_rows).sum()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    hits: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            hits[name].append(contestant())
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)
            print(name, seconds[name][-1], cpu_seconds[name][-1], flush=True)
    completions = options.prompts * 10
    return {
        "completions": completions,
        "rows": options.rows,
        "peer_rows": options.peer_rows,
        "peer_attention": options.peer_attention,
        "seconds_of_rounds": seconds,
        "cpu_seconds_of_rounds": cpu_seconds,
        "hits_of_rounds": hits,
        "completions_per_second": {name: completions / median(s) for name, s in seconds.items()},
        "completions_per_cpu_second": {name: completions / median(s) for name, s in cpu_seconds.items()},
        "times_as_fast": median(seconds["generate"]) / median(seconds["ours"]),
        "times_as_fast_by_cpu_time": median(cpu_seconds["generate"]) / median(cpu_seconds["ours"]),
    }


def recall(options: argparse.Namespace) -> dict[str, Any]:
    """Recall of the same facts by both, 20 trials a fact."""
    records = facts(options.facts)
    prober = make_prober(options, records, templates=2)
    generator, peer = OwnGenerator(load_ours(options), prober.probe.tokenizer), load_peer(options)
    done = {number: prober.count_hits(generator, batch) for number, batch in enumerate(prober.batches)}
    torch.manual_seed(SEED)
    both = [prober.collect(done), peer_hits(peer, prober, [*range(len(prober.questions))], options.peer_rows)]
    return compare(*(hits.reshape(len(records), -1).sum(1) / 20 for hits in both), names=("ours", "generate"))


def compare(first: np.ndarray, second: np.ndarray, *, names: tuple[str, str]) -> dict[str, Any]:
    """Two measurements of the recall of the same facts."""
    difference = first - second
    error = float(difference.std(ddof=1) / len(difference) ** 0.5)
    levels = {
        name: np.bincount(np.ceil(4 * found - 1e-9).clip(0).astype(int), minlength=5).tolist()
        for name, found in zip(names, (first, second), strict=True)
    }
    return {
        "facts": len(first),
        "mean_recall": {name: float(f.mean()) for name, f in zip(names, (first, second), strict=True)},
        "difference": float(difference.mean()),
        "standard_error_of_difference": error,
        "in_standard_errors": float(difference.mean()) / error,
        "correlation_over_facts": float(np.corrcoef(first, second)[0, 1]),
        "facts_of_level": levels,
    }


def greedy(options: argparse.Namespace) -> dict[str, Any]:
    """How many greedy completions of 32 tokens are the same tokens in float32."""
    prober = make_prober(options, facts(options.prompts))
    ours, peer = load_ours(options, "float32"), load_peer(options, "float32")
    stops, same = stop_ids(ours, prober.probe.tokenizer), 0
    chosen = [fact * 21 + fact % 21 for fact in range(options.prompts)]
    for start in range(0, len(chosen), 16):
        batch = chosen[start : start + 16]
        found = decode_batch(
            ours, [prober.prompts[i] for i in batch], Decoding(max_new_tokens=32, stop_ids=stops)
        )
        for question, tokens in zip(batch, found, strict=True):
            text = [prober.questions[question].prompt]
            (expected,) = generate_batch(peer, prober.probe.tokenizer, text, do_sample=False)
            end = next((i for i, token in enumerate(expected) if token in stops), len(expected))
            same += tokens == expected[:end]
    return {"prompts": len(chosen), "same_tokens": same}


def estimators(options: argparse.Namespace) -> dict[str, Any]:
    """Sampling (21 templates x 10) beside likelihood on the same facts."""
    records, generator = (
        facts(options.facts),
        OwnGenerator(load_ours(options), load_tokenizer(str(options.model))),
    )
    recalls, seconds = {}, {}
    for name in ("sampling", "likelihood"):
        prober = make_prober(options, records, estimator=name)
        measure = prober.count_hits if name == "sampling" else prober.expect_hits
        started = time.process_time()
        done = {number: measure(generator, batch) for number, batch in enumerate(prober.batches)}
        seconds[name] = time.process_time() - started
        recalls[name] = prober.collect(done).reshape(len(records), -1).sum(1) / 210
    return compare(recalls["sampling"], recalls["likelihood"], names=("sampling", "likelihood")) | {
        "cpu_seconds": seconds,
        "times_as_fast": seconds["sampling"] / seconds["likelihood"],
    }


if __name__ == "__main__":
    main()
