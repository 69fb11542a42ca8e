"""Pairs a minute of `sftcore match`'s scoring, and what sharing saves.

    python -m benchmarks.match --model .cache/models/smollm2-135m [--pairs 2000]

In: a causal LM's folder. Out: a JSON line: pairs a minute by the clock, processor seconds, tokens a pair and
how many of them are computed, how much longer each pair takes alone with each label text, pairs a minute
where one text is compared with all others.
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
from sftcore.data.wording import question_patterns
from sftcore.fsio import read_jsonl
from sftcore.generate.score import (
    PACK_TOKENS,
    Question,
    continuation_scores,
    load_for_scoring,
    pack_questions,
)
from sftcore.recipe import ASSETS

HERE = Path(__file__).parent
ALONE = 200  # pairs that are also scored one by one
ROUNDS = 5


def pairs(n: int, *, min_letters: int = 0, one_to_many: bool = False) -> list[Record]:
    """Questions (of so many letters) about one fact and another, for the concise English prompt.

    Args:
        one_to_many: let all first texts be the same.
    """
    facts = read_jsonl(ASSETS / "facts" / "train.jsonl")
    patterns = question_patterns()
    asked = [patterns[fact["relation"]].replace("{subject}", fact["subject"]) for fact in facts]
    asked = [question for question in asked if len(question) >= min_letters]
    return [
        Record(
            id=str(i),
            split="x",
            file="x",
            row=i,
            content=Pair(a=asked[0 if one_to_many else i], b=asked[i + 10], label=0),
        )
        for i in range(n)
    ]


def timed(model: Any, questions: list[Question], *, capacity: int = PACK_TOKENS) -> tuple[list[Any], float]:
    """Scores, seconds by the clock."""
    started = time.perf_counter()
    scores = continuation_scores(model, questions, capacity=capacity)
    return scores, time.perf_counter() - started


def matmul_rate() -> float:
    """FLOP a second of this machine in the model's largest product, bfloat16: (2048, 576) by (576, 1536)."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((PACK_TOKENS, 576), (1536, 576)))
    started = time.perf_counter()
    for _ in range(300):
        torch.nn.functional.linear(a, b)
    return 300 * 2 * a.numel() * len(b) / (time.perf_counter() - started)


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
    alone = [
        Question(prompt=[*q.prompt], continuations=(c,)) for q in shared[:ALONE] for c in q.continuations
    ]
    timed(model, shared[:100])
    runs = sorted([timed(model, shared) for _ in range(ROUNDS)], key=lambda run: run[1])
    scores, seconds = runs[ROUNDS // 2]
    apart, apart_seconds = timed(model, alone, capacity=1)
    same_first = prompter.prompt_ids_batch(
        pairs(options.pairs, min_letters=options.min_letters, one_to_many=True)
    )
    _, one_to_many_seconds = timed(
        model, [Question(prompt=p, continuations=both) for p, both in zip(same_first, answers, strict=True)]
    )
    differences = [
        abs(sum(a) - sum(b))
        for pair, i in zip(scores, range(0, len(apart), 2), strict=False)
        for a, b in zip(pair, (apart[i][0], apart[i + 1][0]), strict=True)
    ]
    mean = sum(differences) / len(differences)
    assert mean < 0.2, mean  # nats; bfloat16 itself is as far from float32, in which both are equal
    result = {
        "model": options.model.name,
        "pairs": len(records),
        "tokens_per_pair": sum(map(len, prompts)) / len(prompts),
        "tokens_computed_per_pair": sum(len(pack.input_ids) for pack in pack_questions(shared))
        / len(prompts),
        "threads": torch.get_num_threads(),
        "pairs_per_minute": 60 * len(records) / seconds,
        "one_to_many_pairs_per_minute": 60 * len(records) / one_to_many_seconds,
        "pairs_per_minute_of_each_round": [60 * len(records) / run[1] for run in runs],
        "matmul_gflops_per_second": matmul_rate() / 1e9,
        "alone_seconds_ratio": apart_seconds / ALONE / (seconds / len(records)),
        "mean_difference_nats": mean,
        "largest_difference_nats": max(differences),
    }
    (HERE / "results" / "match.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
