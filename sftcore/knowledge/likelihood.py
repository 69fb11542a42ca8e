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

from sftcore.data.contents import Fact
from sftcore.data.seam import Draft, encode_drafts
from sftcore.data.tokens import Codec
from sftcore.generate.api import Scorer
from sftcore.knowledge.containment import AliasTable, AnswerMatcher, is_unspaced
from sftcore.knowledge.written_forms import written_forms


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
    scorer: Scorer,
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
    scores = scorer.score(codec.encode_prompts(prompts), spellings, temperature=temperature)
    totals = [sum(torch.tensor(found).exp().tolist(), 0.0) for found in scores]
    return [min(total, 1.0) for total in totals]


def _spellings(
    codec: Codec, prompts: Sequence[str], names: Sequence[Sequence[str]], max_tokens: int
) -> list[list[tuple[int, ...]]]:
    """Token ids of each prompt's names after it, as a trained answer would be encoded.

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
    return [_without_longer(found.get(p, set())) for p in range(len(prompts))]


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
