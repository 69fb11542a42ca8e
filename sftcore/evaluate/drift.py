"""How far training moved what the model says first, where it knew the answer best.

In: two models, prompts. Out: one divergence a prompt, and their means by relation.
Invariant: the measure of arXiv 2509.16596: softmax over the tuned model's ten likeliest first
tokens against the base model's logits at the same ids, KL(tuned || base) in nats; 0 for equal models.
Trade-off: ten tokens instead of all: blind to what happens in the tail, and one forward a prompt and model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sftcore.data.records import Record
from sftcore.evaluate.score import FEW_ITEMS
from sftcore.generate.api import batches_by_length
from sftcore.generate.rows import lone_or_cached_rows
from sftcore.knowledge.questions import fact_of
from sftcore.knowledge.templates import Relation, completion_prompts

NUM_TOKENS = 10
PROMPTS_PER_BATCH = 32


def best_templates(hits: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """The wording with the most hits of each relation, the clearest of equals.

    >>> best_templates({"P17": [3, 5, 5]})
    {'P17': 1}

    Args:
        hits: content of levels.templates.json.
    """
    return {relation: max(range(len(row)), key=lambda i: row[i]) for relation, row in hits.items()}


def drift_level(levels: Iterable[int]) -> int:
    """The highest level that at least `FEW_ITEMS` facts have, or the highest that any has.

    The paper's is level 4; a small model has too few facts of it.

    >>> drift_level([0] * 90 + [1] * 30 + [4] * 3), drift_level([0, 2, 1])
    (1, 2)

    Args:
        levels: of the held-out facts, at least one.
    """
    counts = Counter(levels)
    return max([level for level, n in counts.items() if n >= FEW_ITEMS] or counts)


def drift_prompts(
    records: Sequence[Record], templates: Mapping[str, int], relations: Mapping[str, Relation]
) -> list[str]:
    """Each fact in its relation's best wording."""
    prompts = []
    for record in records:
        fact = fact_of(record)
        number = templates[fact.relation]
        prompts.append(completion_prompts(relations[fact.relation], fact.subject, number + 1)[number])
    return prompts


@torch.inference_mode()
def first_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(num_prompts, V) float32 logits of the first token of each completion, on the CPU."""
    logits: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for batch in batches_by_length(prompts, prompts_per_batch=PROMPTS_PER_BATCH):
        found = lone_or_cached_rows(model, [prompts[i] for i in batch]).logits.float().cpu()
        for i, row in zip(batch, found, strict=True):
            logits[i] = row
    return torch.stack(logits)


def drift(tuned_NV: torch.Tensor, base_NV: torch.Tensor) -> list[float]:
    """KL divergence of each row, in nats.

    >>> drift(torch.zeros(1, 20), torch.zeros(1, 20))
    [0.0]
    """
    top = tuned_NV.topk(min(NUM_TOKENS, tuned_NV.shape[-1]), -1)
    tuned = torch.log_softmax(top.values, -1)
    base = torch.log_softmax(base_NV.gather(-1, top.indices), -1)
    return (tuned.exp() * (tuned - base)).sum(-1).clamp(min=0).tolist()


def summarise_drift(records: Sequence[Record], values: Sequence[float], *, level: int) -> dict[str, Any]:
    """Content of drift.json: level and number of the facts, their mean, and the same of each relation."""
    groups: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        groups.setdefault(fact_of(record).relation, []).append(value)
    return {
        "level": level,
        "n": len(values),
        "mean_kl_nats": sum(values) / len(values),
        "by_relation": {
            relation: {"n": len(found), "mean_kl_nats": sum(found) / len(found)}
            for relation, found in sorted(groups.items())
        },
    }
