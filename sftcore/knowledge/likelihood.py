"""The other way to measure recall: how likely the answer is as the completion's beginning, without sampling.

In: prompts and the names that count for each. Out: a probability for each prompt.
Invariant: it is the probability, under the probe's temperature, that a sampled completion begins with one of
the names, spelt in the tokenizer's own way; so it never exceeds the sampled recall's expectation by more than
what goes on inside a word ("Oman" in "Omani").
Trade-off: one forward of prompt and name instead of ten completions of 32 tokens; answers that come later
("the city of Lima"), or in another spelling in tokens, are missed. docs/memory-levels.md compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sftcore.data.contents import Fact
from sftcore.knowledge.containment import AliasTable

ROWS_PER_FORWARD = 32  # their logits are 270 MB for 8 tokens of a 262,144-word vocabulary


def accepted_names(fact: Fact, aliases: AliasTable) -> list[str]:
    """Every name that would count as a hit, each once.

    >>> accepted_names(Fact(relation="P36", subject="Peru", answers=("Lima", "Lima")), AliasTable(rows={}))
    ['Lima']
    """
    names = [name for answer in fact.answers for name in (answer, *aliases.row_of(answer).names)]
    return list(dict.fromkeys(names))


def answer_likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    names: Sequence[Sequence[str]],
    *,
    temperature: float,
    max_new_tokens: int,
) -> list[float]:
    """Probability that a completion of each prompt begins with one of its names.

    Args:
        names: of each prompt, at least one.
        temperature: divides the logits.
        max_new_tokens: names with more tokens can't be completed and count nothing.

    Returns:
        one in [0, 1] for each prompt.
    """
    spellings = [
        (p, ids) for p, own in enumerate(names) for ids in _spellings(tokenizer, own, max_new_tokens)
    ]
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(
        range(len(spellings)), key=lambda i: len(prompt_ids[spellings[i][0]]) + len(spellings[i][1])
    )
    totals = [0.0] * len(prompts)
    for start in range(0, len(order), ROWS_PER_FORWARD):
        batch = [spellings[i] for i in order[start : start + ROWS_PER_FORWARD]]
        chances = _chances(model, [(prompt_ids[p], ids) for p, ids in batch], temperature)
        for (prompt, _), chance in zip(batch, chances, strict=True):
            totals[prompt] += chance
    return [min(total, 1.0) for total in totals]


def _spellings(tokenizer: Any, names: Sequence[str], max_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of the names behind a space; one that begins with another's is left out: it adds nothing."""
    encoded = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    found = sorted({tuple(ids) for ids in encoded if len(ids) <= max_tokens}, key=len)
    return [ids for i, ids in enumerate(found) if not any(ids[: len(s)] == s for s in found[:i])]


@torch.inference_mode()
def _chances(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> list[float]:
    """Probability of each continuation after its prompt.

    Rows are padded on the left, so that the continuations end in the same column and only their columns need
    logits.
    """
    width, longest = max(len(p) + len(c) for p, c in rows), max(len(c) for _, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (prompt, continuation) in enumerate(rows):
        ids[row, width - len(prompt) - len(continuation) :] = torch.tensor([*prompt, *continuation])
        mask[row, width - len(prompt) - len(continuation) :] = 1
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
        use_cache=False,
        logits_to_keep=longest + 1,
    ).logits[:, :-1]
    tempered = logits.float() / temperature
    targets = ids[:, width - longest :].to(model.device)
    picked = tempered.gather(-1, targets[..., None])[..., 0] - tempered.logsumexp(-1)
    counted = torch.tensor([[longest - i <= len(c) for i in range(longest)] for _, c in rows])
    return picked.masked_fill(~counted.to(model.device), 0.0).sum(-1).exp().tolist()
