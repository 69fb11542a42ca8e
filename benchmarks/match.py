"""Pairs a minute of `sftcore match`'s scoring, and what sharing saves.

    python -m benchmarks.match --model .cache/models/smollm2-135m [--pairs 2000]

In: a causal LM's folder. Out: a JSON line: pairs a minute by the clock, processor seconds, tokens a pair, how
much longer it takes to compute the prompt anew for each label text.
Invariant: both ways give the same log-likelihoods but for bfloat16's rounding, which is asserted.
Trade-off: pairs are questions about shipped facts (English, alike in length), so that any tokenizer has about
40 tokens a pair.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sftcore.config import ModelSettings, Recipe
from sftcore.data.contents import Pair
from sftcore.data.prompts import Prompter, PromptOptions
from sftcore.data.records import Record
from sftcore.data.tokens import load_tokenizer
from sftcore.fsio import read_jsonl
from sftcore.knowledge.templates import question_of
from sftcore.model.likelihood import Question, continuation_scores, load_for_scoring
from sftcore.recipe import ASSETS

HERE = Path(__file__).parent


def pairs(n: int, *, min_letters: int = 0) -> list[Record]:
    """Questions (of so many letters) about one fact and another, for the concise English prompt."""
    facts = read_jsonl(ASSETS / "facts" / "train.jsonl")
    asked = [question_of(fact["relation"], fact["subject"]) for fact in facts]
    asked = [question for question in asked if len(question) >= min_letters]
    return [
        Record(id=str(i), split="x", file="x", row=i, content=Pair(a=asked[i], b=asked[i + 10], label=0))
        for i in range(n)
    ]


def timed(model: Any, questions: list[Question]) -> tuple[list[Any], float, float]:
    """Scores, seconds by the clock, seconds of processor time."""
    started, used = time.perf_counter(), time.process_time()
    scores = continuation_scores(model, questions)
    return scores, time.perf_counter() - started, time.process_time() - used


def main() -> None:
    """Score once with sharing, once without, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--min-letters", type=int, default=0, help="of each question: longer pairs")
    options = parser.parse_args()
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(options.model.resolve())},
            "task": "matching",
            "data": {"train": [{"format": "pairs", "path": "x"}]},
            "batch": {"samples_per_step": 1},
        }
    )
    records = pairs(options.pairs, min_letters=options.min_letters)
    prompter = Prompter(PromptOptions.of(recipe), load_tokenizer(recipe.model.path))
    prompts, answers = prompter.prompt_ids_batch(records), prompter.label_ids_batch(records)
    model = load_for_scoring(ModelSettings(path=recipe.model.path))
    shared = [Question(prompt=p, continuations=both) for p, both in zip(prompts, answers, strict=True)]
    alone = [Question(prompt=[*q.prompt], continuations=(c,)) for q in shared for c in q.continuations]
    timed(model, shared[:100])
    scores, seconds, processor_seconds = timed(model, shared)
    apart, apart_seconds, apart_processor_seconds = timed(model, alone)
    differences = [
        abs(sum(a) - sum(b))
        for pair, i in zip(scores, range(0, len(apart), 2), strict=True)
        for a, b in zip(pair, (apart[i][0], apart[i + 1][0]), strict=True)
    ]
    mean = sum(differences) / len(differences)
    assert mean < 0.1, mean  # nats, bfloat16; in float32 they are equal (tests/model/test_likelihood.py)
    result = {
        "model": options.model.name,
        "pairs": len(records),
        "tokens_per_pair": sum(map(len, prompts)) / len(prompts),
        "threads": torch.get_num_threads(),
        "pairs_per_minute": 60 * len(records) / seconds,
        "processor_seconds": processor_seconds,
        "unshared_seconds_ratio": apart_seconds / seconds,
        "unshared_processor_ratio": apart_processor_seconds / processor_seconds,
        "mean_difference_nats": mean,
        "largest_difference_nats": max(differences),
    }
    (HERE / "results" / "match.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
