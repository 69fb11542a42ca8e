"""The other way to measure recall: how likely the answer is as the completion's beginning, without sampling.

In: prompts and the names that count for each. Out: a probability for each prompt.
Invariant: it is the probability, under the probe's temperature, that a sampled completion begins with one of
the names, perhaps after an article ("the United States"), in the ids that the tokenizer gives them after
this prompt. No two of the beginnings that are added up can both come true (none begins with another), so the
sum is a probability, and never exceeds the sampled recall's expectation by more than what goes on inside a
word ("Oman" in "Omani") or into another name.
What stands between prompt and name: a space ("is" + " Lima"), nothing between unspaced scripts ("首都是" +
"北京"), and where just one of them is unspaced, either is counted.
Trade-off: one forward of prompt and name, about three names an answer, instead of ten completions of 32
tokens; answers that come later ("the city of Lima"), or in another spelling in tokens, are missed.
docs/memory-levels.md compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sftcore.data.contents import Fact
from sftcore.data.seam import Draft, encode_drafts
from sftcore.data.tokens import Codec
from sftcore.knowledge.containment import AliasTable, AnswerMatcher, is_unspaced
from sftcore.knowledge.written_forms import written_forms

ROWS_PER_FORWARD = 32  # their logits are 270 MB for 8 tokens of a 262,144-word vocabulary


def accepted_names(fact: Fact, aliases: AliasTable) -> list[str]:
    """Every name that would count as a hit, in the forms in which it may begin a completion, each once.

    Not in those that containment takes for something else ("the rock" for the music).

    >>> accepted_names(Fact(relation="P36", subject="Peru", answers=("Lima", "Lima")), AliasTable(rows={}))
    ['Lima', 'the Lima']
    """
    names = [name for answer in fact.answers for name in (answer, *aliases.row_of(answer).names)]
    matcher = AnswerMatcher(fact.answers, aliases)
    forms = [form for name in dict.fromkeys(names) for form in _forms(name)]
    return [form for form in dict.fromkeys(forms) if form in names or matcher.matches(form)]


def _forms(name: str) -> list[str]:
    """A name in a script that puts no spaces between words has no article."""
    return [name] if any(map(is_unspaced, name)) else written_forms(name)


def answer_likelihoods(
    model: PreTrainedModel,
    codec: Codec,
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
    spellings = _spellings(codec, prompts, names, max_new_tokens)
    prompt_ids = codec.encode_prompts(prompts)
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


def _spellings(
    codec: Codec, prompts: Sequence[str], names: Sequence[Sequence[str]], max_tokens: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(number of its prompt, token ids) of each name after its prompt, as a trained answer would be encoded.

    One that begins with another's is left out: it adds nothing.
    """
    texts = [
        (p, separator + name)
        for p, own in enumerate(names)
        for name in own
        for separator in _separators(prompts[p], name)
    ]
    encoded = encode_drafts(codec, [Draft(pieces=(prompts[p], text), is_bare=False) for p, text in texts])
    found: dict[int, set[tuple[int, ...]]] = {}
    for (p, _), sample in zip(texts, encoded, strict=True):
        if sample and sample.num_trained <= max_tokens:
            found.setdefault(p, set()).add(tuple(sample.ids[sample.num_prompt :]))
    return [(p, ids) for p, spellings in found.items() for ids in _without_longer(spellings)]


def _separators(prompt: str, name: str) -> tuple[str, ...]:
    """What may stand between them.

    >>> pairs = [("Peru's capital is", "Lima"), ("中国的首都是", "北京"), ("首都：", "北京")]
    >>> [_separators(prompt, name) for prompt, name in pairs]
    [(' ',), ('',), ('', ' ')]
    """
    num_unspaced = is_unspaced(prompt[-1]) + is_unspaced(name[0])
    return ((" ",), ("", " "), ("",))[num_unspaced]


def _without_longer(spellings: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that don't begin with another.

    >>> _without_longer({(1, 2), (1,), (2, 1)})
    [(1,), (2, 1)]
    """
    found = sorted(spellings, key=lambda ids: (len(ids), ids))
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
