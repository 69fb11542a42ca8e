"""`sftcore inspect`: what the model will really see, token by token.

In: a recipe. Out: lines of text: samples with trained tokens marked, packs drawn, the first step explained.
Invariant: everything is read back from the token store and the schedule, the very ones that training uses.
Trade-off: tokens are decoded one by one (a split character shows as a replacement sign), so that each can
be marked by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from sftcore.amounts import counted
from sftcore.batching.collate import UNTRAINED
from sftcore.batching.schedule import Schedule, Step
from sftcore.config import Recipe
from sftcore.data.store import TokenStore
from sftcore.model.cost import measure_recipe
from sftcore.stages.prepare import prepare
from sftcore.train.plan import make_schedule
from sftcore.train.rates import learning_rate

GREEN, DIM, RESET = "\033[32;1m", "\033[2m", "\033[0m"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
DRAWN_COLUMNS = 60
REPLACEMENT = "\ufffd"  # what a part of a character decodes to


def inspect_recipe(
    recipe: Recipe, *, num_samples: int, colour: bool, with_ids: bool = False
) -> Iterator[str]:
    """Lines to print.

    Args:
        with_ids: also a line for each token of these samples.
        colour: mark trained tokens by colour; else by [brackets].
    """
    tokenizer, store = prepare(recipe)
    schedule = make_schedule(recipe, store, world=1, cost=measure_recipe(recipe).coefficients)
    first = schedule.step(0)
    mark = (GREEN, RESET) if colour else ("[", "]")
    yield f"{counted(len(store), 'sample')}; {mark[0]}trained{mark[1]} targets are marked"
    for number in first.samples[:num_samples].tolist():
        yield ""
        length, trained = store.lengths[number], store.num_trained[number]
        yield f"sample {store.ids[number]}: {counted(length, 'token')}, {trained} trained"
        yield "  " + marked_text(store[number], tokenizer, mark)
        if with_ids:
            yield from _token_lines(store[number], tokenizer, mark)
    yield ""
    yield from _draw_step(store, schedule, first)
    yield ""
    yield from _explain_step(recipe, schedule, first)


def marked_text(sample: Any, tokenizer: Any, mark: tuple[str, str]) -> str:
    """The sample's text with every trained target in `mark`.

    Position i predicts token i + 1, so token i + 1 is marked where labels[i] is trained. Tokens that hold
    parts of one character are shown together. A class stands after the text.
    """
    trained = _trained_tokens(sample)
    text, pending, before = "", [], list[int]()
    for position, token in enumerate(sample.input_ids.tolist()):
        pending.append(token)
        piece = _decoded_behind(before, pending, tokenizer)
        is_last = position + 1 == len(trained) or trained[position + 1] != trained[position]
        if piece.endswith(REPLACEMENT) and not is_last:
            continue
        piece = CONTROL.sub(lambda found: repr(found[0])[1:-1], piece)  # else a sample could colour itself
        text += f"{mark[0]}{piece}{mark[1]}" if trained[position] else piece
        before, pending = pending, []
    if sample.labels[-1] != UNTRAINED:
        text += f" -> class {mark[0]}{sample.labels[-1]}{mark[1]}"
    return text


def _decoded_behind(before: list[int], ids: list[int], tokenizer: Any) -> str:
    """The text of some tokens after others: SentencePiece's decoders drop the space in front of a text."""
    text, context = tokenizer.decode([*before, *ids]), tokenizer.decode(before) if before else ""
    return str(text[len(context) :]) if text.startswith(context) else str(tokenizer.decode(ids))


def _trained_tokens(sample: Any) -> list[bool]:
    """Whether each token is a trained target."""
    return [False, *(np.asarray(sample.labels[:-1]) != UNTRAINED).tolist()]


def _token_lines(sample: Any, tokenizer: Any, mark: tuple[str, str]) -> Iterator[str]:
    """Place, id and text of each token; a part of a character is shown as the vocabulary has it."""
    ids = sample.input_ids.tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    for place, (token, name, is_trained) in enumerate(zip(ids, names, _trained_tokens(sample), strict=True)):
        text = _decoded_behind(ids[max(0, place - 1) : place], [token], tokenizer)
        shown = repr(name if REPLACEMENT in text else text)
        yield f"  {place:>6} {token:>7}  {f'{mark[0]}{shown}{mark[1]}' if is_trained else shown}"


def _draw_step(store: TokenStore, schedule: Schedule, step: Step) -> Iterator[str]:
    """One line per pack: documents end to end, # where a target is trained."""
    yield f"first step: {counted(len(step.packs), 'pack')}, capacity {schedule.capacity} tokens"
    longest = max(int(schedule.lengths[pack].sum()) for pack in step.packs)
    per_column = max(1, -(-longest // DRAWN_COLUMNS))
    yield f"one column is {counted(per_column, 'token')}; . prompt  # trained  | next document"
    for pack in step.packs:
        drawn = []
        for number in pack.tolist():
            trained = np.asarray(store[number].labels) != UNTRAINED
            chunks = [trained[i : i + per_column] for i in range(0, len(trained), per_column)]
            drawn.append("".join("#" if chunk.any() else "." for chunk in chunks))
        yield f"  {int(schedule.lengths[pack].sum()):>6} tokens  {'|'.join(drawn)}"


def _explain_step(recipe: Recipe, schedule: Schedule, step: Step) -> Iterator[str]:
    """The numbers that step 1 will use, with their arithmetic."""
    rate = learning_rate(0, schedule.num_steps, recipe.train)
    samples = counted(step.num_samples, "sample")
    yield f"step 1 of {schedule.num_steps}: {samples}, {counted(step.num_tokens, 'token')}"
    if recipe.train.normalise == "token":
        trained = counted(step.num_trained_tokens, "trained token")
        yield f"  loss = sum of cross-entropies / {trained} of the step"
    else:
        yield f"  loss = mean over {samples} of each one's mean cross-entropy"
    yield f"  learning rate {rate:.3g} ({recipe.train.scheduler}, peak {recipe.train.peak_lr:.3g})"
