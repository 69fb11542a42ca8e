"""`sftcore rationales`: ask a teacher why pairs match or not, and keep what agrees with the gold labels.

In: a recipe's training pairs (those that `select` draws) and `matching.teacher`. Out: a `pairs` file with a
rationale in each row, and next to it FILE.summary.json; RUN/teacher.jsonl holds every reply.
Invariant: pairs = kept + disagreeing + unparsable + failed; the file appears whole, in the order of the data.
Trade-off: the teacher sees no gold label, so its reply is a judgement and some are lost to disagreement (the
summary reports the yield); given the answer, it would find reasons for wrong labels too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftcore.amounts import counted
from sftcore.config import Recipe
from sftcore.data.bounded import bounded
from sftcore.data.draws import draw_selected
from sftcore.data.ledger import Ledger
from sftcore.data.prepare import load_records
from sftcore.data.rationales import MIN_REASONED_PAIRS, read_reply
from sftcore.data.records import Record
from sftcore.data.tokens import codec_of, load_tokenizer
from sftcore.data.wording import load_template
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import write_json, write_jsonl
from sftcore.generate.api import Decoding, Reply, complete_all
from sftcore.generate.own import OwnGenerator
from sftcore.generate.server import Failure, ReplyCache, ServerGenerator
from sftcore.model.load import load_for_decoding
from sftcore.runs.claim import open_run
from sftcore.settings import MatchingSettings, TeacherSettings
from sftcore.tasks.kinds.pair import label_words, language_of, pair_in

log = logging.getLogger("sftcore.rationales")
TOKENS_PER_PRICE = 1_000_000
Replies = Mapping[str, Reply | Failure]


def write_rationales(recipe: Recipe, to: Path | None = None) -> dict[str, Any]:
    """Ask of the training pairs (those that `select` draws) what the cache does not hold; write what is kept.

    Args:
        to: the pairs file; None: RUN/rationales.jsonl.

    Returns:
        the summary: counts, yield, tokens, cost, and whether there are enough for an arm.

    Raises:
        UserInputError: no teacher in the recipe, or its server refuses us.
        MissingEnvironmentError: the server is gone; what it said so far is kept.
    """
    teacher = recipe.matching.teacher
    if recipe.task != "matching" or teacher is None:
        remedy = "e.g. teacher: {base_url: http://127.0.0.1:8000/v1, model: NAME}"
        raise UserInputError(Problem(what="no teacher is named", where="matching.teacher", remedy=remedy))
    with open_run(recipe, purpose="rationales") as run:
        records = draw_selected(load_records(recipe, "train", Ledger()), recipe.select, seed=recipe.seed)
        prompts = {record.id: teacher_prompt(record, recipe.matching) for record in records}
        named = {"model": teacher.model or recipe.model.path}
        deciding = {"backend", "temperature", "max_new_tokens"}
        cache = ReplyCache(run / "teacher.jsonl", teacher.model_dump(include=deciding) | named)
        decoding = Decoding(max_new_tokens=teacher.max_new_tokens, temperature=teacher.temperature)
        if teacher.backend == "server":
            found = ServerGenerator(teacher, cache).complete([*prompts.values()], decoding)
            replies: Replies = {key: reply for key, (reply,) in zip(prompts, found, strict=True)}
        else:
            replies = _ask_here(recipe, decoding, prompts, cache)
        kept, counts = keep_agreeing(records, replies, recipe.matching)
        summary = summarise(counts, replies, teacher)
        warn_of_failures(summary)
        target = to or run / "rationales.jsonl"
        write_jsonl(target, kept)
        write_json(target.with_name(target.name + ".summary.json"), summary)
        return {"file": str(target), **summary}


def teacher_prompt(record: Record, settings: MatchingSettings) -> str:
    """The complex prompt that asks for a reason and then a conclusion; without the gold label."""
    pair = pair_in(record.content)
    language = language_of(pair, settings.language)
    template = load_template(f"matching-complex-before-{language}", task="matching")
    different, same = label_words(pair, settings)
    values = {"a": pair.a, "b": pair.b, "label_0": different, "label_1": same, "label": ""}
    return template.fill(values)[0]


def keep_agreeing(
    records: Sequence[Record], replies: Replies, settings: MatchingSettings
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of pairs whose reply concludes with the gold label, and what became of all pairs."""
    kept, counts = [], Counter(kept=0, disagreeing=0, unparsable=0, failed=0)
    for record in records:
        fate, rationale = _judge(record, replies[record.id], settings)
        counts[fate] += 1
        if fate == "kept":
            pair = pair_in(record.content)
            row = {"id": record.id, "sentence1": pair.a, "sentence2": pair.b, "label": pair.label}
            kept.append({**row, "rationale": rationale})
    return kept, counts


def _judge(record: Record, reply: Reply | Failure, settings: MatchingSettings) -> tuple[str, str]:
    """(kept | disagreeing | unparsable | failed, rationale)."""
    pair = pair_in(record.content)
    if isinstance(reply, Failure):
        return "failed", ""
    label, rationale = read_reply(reply.text, label_words(pair, settings))
    if label is None or not rationale:
        return "unparsable", ""
    return ("kept" if label == pair.label else "disagreeing"), rationale


def summarise(counts: Counter[str], replies: Replies, teacher: TeacherSettings) -> dict[str, Any]:
    """Counts, why replies are missing, the share that was kept, tokens and what they cost."""
    given = [reply for reply in replies.values() if isinstance(reply, Reply)]
    num_input, num_output = (
        sum(reply.num_input_tokens for reply in given),
        sum(reply.num_output_tokens for reply in given),
    )
    whys = Counter(reply.why for reply in replies.values() if isinstance(reply, Failure))
    cost = (num_input * teacher.input_price + num_output * teacher.output_price) / TOKENS_PER_PRICE
    return {
        "num_pairs": counts.total(),
        **counts,
        "failed_by_reason": dict(whys.most_common()),
        "yield": counts["kept"] / counts.total(),
        "num_input_tokens": num_input,
        "num_output_tokens": num_output,
        "cost": cost,
        "arm": "run"
        if counts["kept"] >= MIN_REASONED_PAIRS
        else f"not run: fewer than {MIN_REASONED_PAIRS} kept",
    }


def in_a_sentence(summary: Mapping[str, Any]) -> str:
    """What became of the pairs, what it cost, and where the kept ones are.

    >>> in_a_sentence({"num_pairs": 4, "kept": 2, "disagreeing": 1, "unparsable": 1, "failed": 0, "cost": 0.0,
    ...                "num_input_tokens": 1200, "num_output_tokens": 80, "file": "r.jsonl"})
    '2 of 4 pairs kept (1 disagreeing, 1 unparsable, 0 failed), 1,200 tokens in and 80 out: r.jsonl'
    """
    others = ", ".join(f"{summary[fate]:,} {fate}" for fate in ("disagreeing", "unparsable", "failed"))
    kept = f"{summary['kept']:,} of {summary['num_pairs']:,} pairs kept ({others})"
    tokens = f"{summary['num_input_tokens']:,} tokens in and {summary['num_output_tokens']:,} out"
    cost = f", cost {summary['cost']:.2f}" if summary["cost"] else ""
    return f"{kept}, {tokens}{cost}: {summary['file']}"


def warn_of_failures(summary: Mapping[str, Any]) -> None:
    """One line: how many pairs got no reply, and why."""
    if whys := summary["failed_by_reason"]:
        reasons = ", ".join(f"{why} {count}" for why, count in whys.items())
        num_failed, num_pairs = sum(whys.values()), summary["num_pairs"]
        log.warning("%d of %d pairs failed: %s; the next call asks again", num_failed, num_pairs, reasons)


def _ask_here(
    recipe: Recipe, decoding: Decoding, prompts: Mapping[str, str], cache: ReplyCache
) -> dict[str, Reply]:
    """Greedy replies of a model in this process, batch by batch into the cache."""
    known = {key: cache.get(prompt) for key, prompt in prompts.items()}
    todo = [key for key, reply in known.items() if reply is None]
    log.info("%s to ask; the other replies are in %s", counted(len(todo), "prompt"), cache.path)
    teacher = recipe.matching.teacher
    path = (teacher and teacher.model) or recipe.model.path
    settings = recipe.model.model_copy(update={"path": path})
    tokenizer = load_tokenizer(settings.path, settings.trust_remote_code)
    ids = _as_asked(tokenizer, [prompts[key] for key in todo])
    if todo:
        generator = OwnGenerator(load_for_decoding(settings), tokenizer)
        batch_size = recipe.evaluate.batch_size
        for i, (reply,) in complete_all(
            generator, ids, decoding, prompts_per_batch=batch_size, label="asking the model"
        ):
            cache.put(prompts[todo[i]], reply)
            known[todo[i]] = reply
    return {key: reply for key, reply in known.items() if reply is not None}


def _as_asked(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The prompts as the model's chat template puts them, or as they stand for a base model."""
    if tokenizer.chat_template is None:
        return codec_of(tokenizer).encode_prompts(prompts)
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    try:
        return [_asked(tokenizer, turn) for turn in turns]
    except Exception as error:  # the template is somebody else's program
        what = f"the teacher's chat template fails: {type(error).__name__}: {error}"
        raise UserInputError(Problem(what=what, where="matching.teacher.model")) from error


def _asked(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    with bounded():
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
