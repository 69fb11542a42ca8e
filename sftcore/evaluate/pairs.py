"""Predictions for pairs: the likelier label text, the generated one, or a classifier's class.

In: pair records, a model folder, the recipe's matching section. Out: rows of predictions.jsonl with the score
of label 1.
Invariant: the prompt is the one that training conditioned on; `correct` means the gold label, however it was
predicted.
Trade-off: a generated text that is not exactly in the trained form counts as unparsable and wrong; their
number is reported (a base model: often all), as a lenient reading would hide an unlearnt form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sftcore.config import Recipe
from sftcore.data.ledger import Ledger, Reason, Rejection, printable
from sftcore.data.prompts import Prompter
from sftcore.data.records import Record
from sftcore.evaluate.few_shot import first_paragraph
from sftcore.generate.api import Decoding, complete_all
from sftcore.generate.own import OwnGenerator
from sftcore.generate.score import Question, class_logits, load_for_scoring
from sftcore.model.adapters import is_adapter
from sftcore.model.encoder import encoder_logits
from sftcore.model.identity import base_of
from sftcore.model.load import load_config, load_for_decoding
from sftcore.model.positions import position_limit
from sftcore.settings import MATCHING_FILE
from sftcore.shares import WHOLE, Share
from sftcore.tasks import TASKS
from sftcore.tasks.kinds.pair import LANGUAGES, label_words, language_of, pair_in, said_label

__all__ = ["Verdict", "has_learnt_labels", "judge_pairs", "pair_rows", "reject_overlong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a model says of a pair.

    Args:
        label: 0 or 1; None where a generated text holds no label in the trained form.
        text: the label's word, or what was generated.
        score: by how much label 1 is preferred: difference of the two label texts' scores in nats, or of the
            two logits; None where text was generated.
    """

    label: int | None
    text: str
    score: float | None


def judge_pairs(
    recipe: Recipe,
    folder: str,
    records: Sequence[Record],
    prompter: Prompter,
    *,
    quantised: bool = False,
    share: Share = WHOLE,
) -> list[Verdict | None]:
    """What the model in `folder` says of each pair, in the records' order; None in another job's share.

    Raises:
        UserInputError: no such model, or one that can't be scored.
    """
    settings = recipe.model.model_copy(update={"path": folder})
    if TASKS[recipe.task].answered_by(recipe.matching) == "generation":
        model = load_for_decoding(settings, quantised=quantised)
        return _generated(recipe, model, records, prompter, share)
    if recipe.architecture == "encoder":
        logits = encoder_logits(recipe, folder, prompter.prompt_ids_batch(records), share=share)
        scores = [None if row is None else row[1] - row[0] for row in logits]
    else:
        model = load_for_scoring(settings, classifies=recipe.classifies, quantised=quantised)
        stops = has_learnt_labels(folder)
        scores = _scores_by_language(recipe, model, records, prompter, share, stops=stops)
    return [
        None if score is None else _verdict(score, record, prompter)
        for score, record in zip(scores, records, strict=True)
    ]


def reject_overlong(
    recipe: Recipe, folder: str, records: Sequence[Record], prompter: Prompter, ledger: Ledger
) -> list[Record]:
    """The items that the model in `folder` has positions for; the others go to the ledger."""
    path = base_of(Path(folder)) if is_adapter(Path(folder)) else folder
    limit = position_limit(load_config(recipe.model.model_copy(update={"path": path})))
    if limit is None or not records:
        return list(records)
    kept = []
    tokens = _tokens_needed(recipe, records, prompter, stops=has_learnt_labels(folder))
    for record, needed in zip(records, tokens, strict=True):
        if needed <= limit:
            kept.append(record)
            continue
        rejection = Rejection(
            file=record.file,
            row=record.row,
            reason=Reason.OVERLENGTH,
            excerpt=printable(record.id),
            detail=f"{needed} tokens, {limit} fit",
        )
        ledger.reject(rejection)
    return kept


def _tokens_needed(
    recipe: Recipe, records: Sequence[Record], prompter: Prompter, *, stops: bool
) -> list[int]:
    """Tokens of each prompt and of what is read after it: the last token of an answer never is."""
    prompts = [len(ids) for ids in prompter.prompt_ids_batch(records)]
    way = TASKS[recipe.task].answered_by(recipe.matching)
    if way == "class":
        return prompts
    if way == "generation":
        return [prompt + recipe.evaluate.max_new_tokens - 1 for prompt in prompts]
    answers = [max(map(len, both)) for both in prompter.label_ids_batch(records, stops=stops)]
    return [prompt + answer - 1 for prompt, answer in zip(prompts, answers, strict=True)]


def has_learnt_labels(folder: str) -> bool:
    """Whether we trained this model on pairs: it then ends a label with the stop token, others need not."""
    return (Path(folder) / MATCHING_FILE).is_file()


def _scores_by_language(
    recipe: Recipe,
    model: PreTrainedModel,
    records: Sequence[Record],
    prompter: Prompter,
    share: Share,
    *,
    stops: bool,
) -> list[float | None]:
    """By how much label 1 is preferred; prompts of a language begin alike, which is computed once a pack."""
    scores: list[float | None] = [None] * len(records)
    for language in LANGUAGES:
        numbers = [i for i, record in enumerate(records) if _language(record, prompter) == language]
        if not numbers:
            continue
        chosen = [records[i] for i in numbers]
        found = (
            _class_margins(model, chosen, prompter, recipe.matching.pooling, share)
            if recipe.classifies
            else _text_margins(model, chosen, prompter, share, stops=stops)
        )
        for i, score in zip(numbers, found, strict=True):
            scores[i] = score
    return scores


def _verdict(score: float, record: Record, prompter: Prompter) -> Verdict:
    label = int(score > 0)
    text = label_words(pair_in(record.content), prompter.options.matching)[label]
    return Verdict(label=label, text=text, score=score)


def _class_margins(
    model: PreTrainedModel, records: Sequence[Record], prompter: Prompter, pooling: str, share: Share
) -> list[float | None]:
    questions = [Question(prompt=ids) for ids in prompter.prompt_ids_batch(records)]
    logits = class_logits(model, questions, pooling=pooling, share=share)
    return [None if row is None else row[1] - row[0] for row in logits]


def _text_margins(
    model: PreTrainedModel, records: Sequence[Record], prompter: Prompter, share: Share, *, stops: bool
) -> list[float | None]:
    prompts, answers = prompter.prompt_ids_batch(records), prompter.label_ids_batch(records, stops=stops)
    scored = OwnGenerator(model, prompter.codec.tokenizer).score(prompts, answers, share=share)
    if prompter.options.matching.normalise == "mean":  # which does not punish the longer label
        return [
            found and _margin(found, [len(ids) for ids in both])
            for found, both in zip(scored, answers, strict=True)
        ]
    return [found and _margin(found, (1, 1)) for found in scored]


def _margin(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """By how much label 1's text is likelier."""
    return scores[1] / sizes[1] - scores[0] / sizes[0]


def _generated(
    recipe: Recipe, model: PreTrainedModel, records: Sequence[Record], prompter: Prompter, share: Share
) -> list[Verdict | None]:
    verdicts: list[Verdict | None] = [None] * len(records)
    for i, (reply,) in complete_all(
        OwnGenerator(model, prompter.codec.tokenizer),
        prompter.prompt_ids_batch(records),
        Decoding(max_new_tokens=recipe.evaluate.max_new_tokens),
        prompts_per_batch=recipe.evaluate.batch_size,
        label="evaluating",
        share=share,
    ):
        text = first_paragraph(reply.text) if recipe.matching.examples else reply.text
        verdicts[i] = Verdict(label=_said(text, records[i], prompter), text=text, score=None)
    return verdicts


def _said(text: str, record: Record, prompter: Prompter) -> int | None:
    return said_label(text, pair_in(record.content), prompter.options.matching)


def _language(record: Record, prompter: Prompter) -> str:
    return language_of(pair_in(record.content), prompter.options.matching.language)


def pair_rows(
    records: Sequence[Record], verdicts: Sequence[Verdict | None], prompter: Prompter
) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl of the pairs that were judged.

    `label` is the gold label's word; `score` prefers label 1 where positive.
    """
    return [
        _row(record, verdict, prompter) for record, verdict in zip(records, verdicts, strict=True) if verdict
    ]


def _row(record: Record, verdict: Verdict, prompter: Prompter) -> dict[str, Any]:
    pair = pair_in(record.content)
    return {
        "id": record.id,
        "prompt": prompter.prompt_text(record),
        "prediction": verdict.text,
        "split": record.split,
        "label": label_words(pair, prompter.options.matching)[pair.label],
        "correct": verdict.label == pair.label,
        "score": verdict.score,
        "parsed": verdict.label is not None,
    }
