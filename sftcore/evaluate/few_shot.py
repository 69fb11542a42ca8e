"""The base model's own best: the same items after a few solved examples, without any training.

In: held-out records, training records, a prompter. Out: prompts as token ids; the text that counts.
Invariant: an example is written exactly as training would show it (prompt, then answer); examples come from
the training split, so none of them is scored.
Trade-off: examples are drawn once for all items (4 of them in recipes/qa-small.yaml), so every prompt shares
them; the luck of that draw is not in the intervals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sftcore.data.prompts import Prompter
from sftcore.data.records import Record
from sftcore.errors import Problem, UserInputError

SEPARATOR = "\n\n"


def choose_examples(
    records: Sequence[Record], count: int, *, seed: int, explained: bool = False
) -> list[Record]:
    """`count` training records, in turn of each relation (of pairs: of each label), as far as there are any.

    Args:
        explained: take only pairs with a rationale.

    Raises:
        UserInputError: there are fewer.
    """
    if explained:
        records = [r for r in records if r.content.why is not None]
    if len(records) < count:
        raise UserInputError(
            Problem(
                what=f"too few training records{' with a rationale' if explained else ''} for the examples",
                where="evaluate.few_shot",
                got=str(count),
                allowed=f"up to {len(records)}",
            )
        )
    ranked = sorted(records, key=lambda r: hashlib.sha256(f"{seed}/example/{r.id}".encode()).digest())
    seen: dict[str, int] = {}
    rounds = []
    for record in ranked:
        group = record.content.example_group
        rounds.append(seen.setdefault(group, 0))
        seen[group] += 1
    order = sorted(range(len(ranked)), key=lambda i: rounds[i])
    return [ranked[i] for i in order[:count]]


def few_shot_prompts(
    records: Sequence[Record], examples: Sequence[Record], prompter: Prompter
) -> list[list[int]]:
    """Token ids of each record's prompt after the examples."""
    solved = [prompter.prompt_text(example) + prompter.answer_text(example) for example in examples]
    texts = [SEPARATOR.join([*solved, prompter.prompt_text(record)]) for record in records]
    return [prompter.codec.with_prefix(ids) for ids in prompter.codec.encode(texts)]


def first_paragraph(text: str) -> str:
    """What the model says before it starts an example of its own.

    >>> first_paragraph(" Lima\\n\\nQ: Where")
    ' Lima'
    """
    return text.split(SEPARATOR)[0]
