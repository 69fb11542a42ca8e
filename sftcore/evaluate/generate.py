"""Evaluation: held-out items + a model -> greedy predictions, each marked right or wrong.

In: records, a model, its tokenizer, levels if known. Out: rows of predictions.jsonl.
Invariant: the prompt is the one that training conditioned on; batches are a function of the items alone.
Trade-off: the whole completion is judged, not its first line: a base model that has not learnt to stop may
hit an answer late in its 16 tokens, so accuracy before training is rather over- than underestimated. (Chats
and completions are right only where the whole reply is.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftcore.config import EvaluateSettings
from sftcore.data.prompts import Prompter
from sftcore.data.records import Record
from sftcore.evaluate.few_shot import few_shot_prompts, first_paragraph
from sftcore.evaluate.replies import Reply, replies_of
from sftcore.generate.api import Decoding, complete_all
from sftcore.generate.own import OwnGenerator
from sftcore.knowledge.containment import AliasTable
from sftcore.shares import WHOLE, Share


def predict(
    records: Sequence[Record],
    generator: OwnGenerator,
    prompter: Prompter,
    settings: EvaluateSettings,
    *,
    examples: Sequence[Record] = (),
    share: Share = WHOLE,
) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl, in the records' order (of a share: of the records in its batches).

    Args:
        records: each can be scored (`reject_unscorable`).
        examples: solved before each prompt (few-shot); then only a completion's first paragraph counts.
    """
    replies = [reply if isinstance(reply, Reply) else None for reply in replies_of(records, prompter)]
    if examples:
        prompts = few_shot_prompts(records, examples, prompter)
    else:
        prompts = prompter.prompt_ids_batch(records)
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=frozenset(reply.stop_id for reply in replies if reply),
    )
    texts = {
        i: first_paragraph(reply.text) if examples else reply.text
        for i, (reply,) in complete_all(
            generator,
            prompts,
            decoding,
            prompts_per_batch=settings.batch_size,
            label="evaluating",
            share=share,
        )
    }
    aliases = AliasTable.load()
    return [
        {
            "id": records[i].id,
            "prompt": generator.tokenizer.decode(prompts[i]),
            "prediction": texts[i],
            "split": records[i].split,
            **records[i].content.graded(texts[i], replies[i], form=prompter.form, aliases=aliases),
        }
        for i in sorted(texts)
    ]


def with_levels(
    rows: Iterable[dict[str, Any]], levels: Mapping[tuple[str, str], int]
) -> list[dict[str, Any]]:
    """Rows of predictions with the `level` of each item that has one, by split and id."""
    keyed = (((row["split"], row["id"]), row) for row in rows)
    return [{**row, "level": levels[key]} if key in levels else row for key, row in keyed]
