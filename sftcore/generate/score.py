"""Scoring prompts and continuations in packs: nothing that several of them share is computed twice.

In: prompts and their continuations as token ids, a model loaded by `load_for_scoring`. Out: log-likelihoods
of the continuations, or a classifier's logits, in the prompts' order.
Invariant: in float32 equal to each prompt with each continuation alone, whatever the packs.
Trade-off: prompts are ordered by their tokens, so that what a prompt and the one before it begin with is
computed once; results are put back in order. Pairs that ask of one text against many cost half; a pack holds
2,048 tokens, whose layers stay in the caches: a fifth faster on two cores than 4,096.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sftcore.config import ModelSettings
from sftcore.errors import Problem, SftError, UserInputError
from sftcore.generate.api import Ids
from sftcore.heap import is_out_of_memory
from sftcore.log import progress
from sftcore.model.adapters import CLASSIFIER, is_adapter
from sftcore.model.attention.needs import needs_of
from sftcore.model.attention.tree import NAME as TREE
from sftcore.model.attention.tree import Fork, Tree, lacks, register_tree_attention
from sftcore.model.classifier import restore_classifier
from sftcore.model.identity import base_of
from sftcore.model.load import load_config, load_for_decoding
from sftcore.model.loss import CHUNK_ELEMENTS
from sftcore.model.miniature import BREAKS
from sftcore.model.proof import ENVIRONMENT, NOT_PACKED, close, computes_attention, probe_ids
from sftcore.model.trial import Way, bound_length, try_code
from sftcore.precision import dtype_of
from sftcore.shares import WHOLE, Share

PACK_TOKENS = 2048
ROWS_PER_FORWARD = 32  # their logits are 270 MB for 8 tokens of a 262,144-word vocabulary
PROBE_TOLERANCE = 5e-2  # of logits, relative to the largest: bfloat16's rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and the continuations that are compared after it (none: its last state is classified)."""

    prompt: Ids
    continuations: tuple[Ids, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPack:
    """Questions laid out as a tree, one fork each.

    Args:
        numbers: which questions these are.
        input_ids: (T,) of each prompt what the one before it does not begin with, then its continuations
            without their last token.
        position_ids: (T,).
        tree: their shape.
        asked: per question and continuation the positions in the pack whose next token is the continuation's
            1st, 2nd, ...; without continuations the prompt's last position.
    """

    numbers: list[int]
    input_ids: list[int]
    position_ids: list[int]
    tree: Tree
    asked: list[list[list[int]]]


def pack_questions(questions: Sequence[Question], *, capacity: int = PACK_TOKENS) -> Iterator[ScoringPack]:
    """Questions in packs of at most `capacity` tokens (a longer question gets one of its own).

    What all prompts begin with is not counted: however long it is, it is shared by a pack of many.
    """
    numbers: list[int] = []
    shared: list[int] = []
    filled = 0
    order = sorted(range(len(questions)), key=lambda i: list(questions[i].prompt))
    if order:
        capacity += shared_tokens(questions[order[0]].prompt, questions[order[-1]].prompt)
    for i in order:
        prompt = questions[i].prompt
        size = len(prompt) + sum(len(continuation) - 1 for continuation in questions[i].continuations)
        common = shared_tokens(questions[numbers[-1]].prompt, prompt) if numbers else 0
        if numbers and filled + size - common > capacity:
            yield _lay_out(questions, numbers, shared)
            numbers, shared, filled, common = [], [], 0, 0
        numbers.append(i)
        shared.append(common)
        filled += size - common
    if numbers:
        yield _lay_out(questions, numbers, shared)


def shared_tokens(before: Ids, prompt: Ids) -> int:
    """How many tokens a prompt begins with that the one before it begins with too, but for its last.

    >>> shared_tokens([1, 2, 3], [1, 2, 4]), shared_tokens([1, 2, 3], [1, 2, 3])
    (2, 2)
    """
    return len(commonprefix([list(before), list(prompt[:-1])]))


def _lay_out(questions: Sequence[Question], numbers: list[int], shared: list[int]) -> ScoringPack:
    """The first prompt whole, of each other the tokens that it does not share with the one before it."""
    ids: list[int] = []
    at: list[int] = []
    forks, asked = [], []
    path = np.empty(0, int)
    for i, common in zip(numbers, shared, strict=True):
        question = questions[i]
        branches = tuple(len(continuation) - 1 for continuation in question.continuations)
        trunk = len(question.prompt) - common
        fork = Fork(start=len(ids), before=path[:common], trunk=trunk, branches=branches)
        ids += question.prompt[common:]
        last, places = len(ids) - 1, []
        for continuation in question.continuations:
            places.append([last, *range(len(ids), len(ids) + len(continuation) - 1)])
            ids += continuation[:-1]
        at += fork.positions().tolist()
        forks.append(fork)
        asked.append(places or [[last]])
        path = fork.path()
    return ScoringPack(numbers=numbers, input_ids=ids, position_ids=at, tree=Tree(forks=forks), asked=asked)


def load_for_scoring(
    settings: ModelSettings, *, classifies: bool = False, quantised: bool = False
) -> PreTrainedModel:
    """The model (or adapter with its base) with tree attention, on the GPU if there is one.

    Args:
        classifies: load a `...ForSequenceClassification`.
        quantised: hold the base in 4 bits, as QLoRA trained it.

    Raises:
        UserInputError: no such model, or one whose attention or logits this module would get wrong.
    """
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    _check_code(settings, kind)
    attention = register_tree_attention()
    try:
        model = load_for_decoding(settings, quantised=quantised, attention=attention, kind=kind)
        if classifies:
            restore_classifier(model, Path(settings.path))
        has_own_logits, has_own_states = classifies or _logits_agree(model), _states_agree(model)
    except ENVIRONMENT:
        raise
    except BREAKS as error:
        if is_out_of_memory(error):
            raise
        raise UserInputError(_unfit(settings, str(error).strip().split("\n")[0])) from error
    if not has_own_logits:
        raise UserInputError(_unfit(settings, "it changes its logits in a way that the scores would miss"))
    if not has_own_states:
        raise UserInputError(_unfit(settings, "its attention is none of those that we compute"))
    return model


def _check_code(settings: ModelSettings, kind: Any) -> None:
    """Refuse a model whose code would get trees wrong, by its configuration alone.

    Raises:
        UserInputError: with the reason that training gives.
        MissingEnvironmentError: it needs a package that is not installed.
    """
    folder = Path(settings.path)
    base = settings.model_copy(update={"path": base_of(folder)}) if is_adapter(folder) else settings
    config = load_config(base)
    try:
        try_code(config, Way(longest=0, kind=kind))
    except SftError as error:
        why = error.problems[0].what.rpartition(f"{NOT_PACKED}: ")[2].replace("the loss", "the scores")
        raise type(error)(_unfit(settings, why)) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reasons := lacks(needs_of(config, dtype=dtype_of(settings), device=device)):
        raise UserInputError(_unfit(settings, ", ".join(reasons)))


def _unfit(settings: ModelSettings, why: str) -> Problem:
    remedy = "set matching.predict: generate"
    return Problem(what=f"labels can't be scored with this model: {why}", where=settings.path, remedy=remedy)


@torch.inference_mode()
def _logits_agree(model: PreTrainedModel) -> bool:
    """Whether our way from states to logits is the model's own, on five tokens."""
    ids = probe_ids(model.config, 5)[None].to(model.device)
    own = model(input_ids=ids, tree=_lone(5), use_cache=False).logits.float()
    states = model.get_decoder()(input_ids=ids, tree=_lone(5), use_cache=False).last_hidden_state
    return close(_vocabulary_logits(model, states), own, PROBE_TOLERANCE)


@torch.inference_mode()
def _states_agree(model: PreTrainedModel) -> bool:
    """Whether transformers' own attention gives the same states, on seven tokens."""
    ids = probe_ids(model.config, 7).to(model.device)
    ours = model.get_decoder()(input_ids=ids[None], tree=_lone(7), use_cache=False).last_hidden_state
    return computes_attention(model, [ids], [ours])


def _lone(num_tokens: int) -> Tree:
    """One text."""
    return Tree(forks=(Fork(start=0, before=np.empty(0, int), trunk=num_tokens),))


def _vocabulary_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """(..., V) float32 from (..., D)."""
    head: Any = model.get_output_embeddings()
    logits: torch.Tensor = head(states).float()
    softcap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def score_questions(
    model: PreTrainedModel, questions: Sequence[Question], *, temperature: float = 1.0, share: Share = WHOLE
) -> list[Any]:
    """Per question: the log-likelihood of each continuation, in nats; None in another job's share.

    In packs where the model was loaded for that (`load_for_scoring`), else in padded rows, which are not
    shared.

    Args:
        temperature: divides the logits.
    """
    if model.config._attn_implementation != TREE:
        assert share == WHOLE, share
        return padded_scores(model, questions, temperature)
    assert temperature == 1, "packs are scored as they are"
    found = continuation_scores(model, questions, share=share)
    return [None if scores is None else [sum(tokens) for tokens in scores] for scores in found]


def padded_scores(
    model: PreTrainedModel, questions: Sequence[Question], temperature: float
) -> list[list[float]]:
    """As `score_questions`, a row each prompt and continuation, next to others of like length."""
    rows = [(question.prompt, c) for question in questions for c in question.continuations]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), ROWS_PER_FORWARD):
        batch = order[start : start + ROWS_PER_FORWARD]
        for i, score in zip(batch, _padded(model, [rows[i] for i in batch], temperature), strict=True):
            found[i] = score
    scores = iter(found)
    return [[next(scores) for _ in question.continuations] for question in questions]


@torch.inference_mode()
def _padded(model: PreTrainedModel, rows: Sequence[tuple[Ids, Ids]], temperature: float) -> list[float]:
    """Log-likelihood of each continuation after its prompt.

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
    scores: list[float] = picked.masked_fill(~counted.to(model.device), 0.0).sum(-1).tolist()
    return scores


def continuation_scores(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    capacity: int = PACK_TOKENS,
    share: Share = WHOLE,
) -> list[Any]:
    """Per question and continuation: the log-likelihood of each of its tokens, in nats, in packs.

    A question in another job's share gets None.
    """

    def score(pack: ScoringPack, states_TD: torch.Tensor) -> list[list[list[float]]]:
        places = [place for question in pack.asked for place in question]
        targets = [t for i in pack.numbers for c in questions[i].continuations for t in c]
        flat = iter(_log_likelihoods(model, states_TD, [p for place in places for p in place], targets))
        return [[[next(flat) for _ in place] for place in question] for question in pack.asked]

    return _for_all(model, questions, capacity, score, share)


def class_logits(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    capacity: int = PACK_TOKENS,
    pooling: str = "last",
    share: Share = WHOLE,
) -> list[Any]:
    """Per question: the classifier's logits of the prompt's last state, or of its mean state; or None."""
    pooled = _mean_states if pooling == "mean" else _last_states

    def score(pack: ScoringPack, states_TD: torch.Tensor) -> list[list[float]]:
        return model.get_submodule(CLASSIFIER)(pooled(pack, states_TD)).float().tolist()

    return _for_all(model, questions, capacity, score, share)


def _last_states(pack: ScoringPack, states_TD: torch.Tensor) -> torch.Tensor:
    """(N, D) state of each prompt's last token."""
    return states_TD[torch.tensor([question[0][0] for question in pack.asked], device=states_TD.device)]


def _mean_states(pack: ScoringPack, states_TD: torch.Tensor) -> torch.Tensor:
    """(N, D) mean over each prompt's tokens, shared ones among them; summed in float32."""
    paths = [torch.from_numpy(fork.path()).to(states_TD.device) for fork in pack.tree.forks]
    return torch.stack([states_TD[path].float().mean(0) for path in paths]).to(states_TD.dtype)


def _check_lengths(model: PreTrainedModel, questions: Sequence[Question]) -> None:
    """Refuse texts beyond a length at which they would change what the others of a pack get.

    Raises:
        UserInputError: with that length.
    """
    bound = bound_length(model.config)
    longest = max((len(q.prompt) + max(map(len, q.continuations), default=0) for q in questions), default=0)
    if bound is not None and longest > bound:
        raise UserInputError(
            Problem(
                what=f"labels can't be scored: model type {model.config.model_type!r} computes longer texts "
                "otherwise, and all of a pack with them",
                got=f"a text of {longest} tokens",
                allowed=f"at most {bound}",
                remedy="set matching.predict: generate, or shorten the texts",
            )
        )


@torch.inference_mode()
def _for_all(
    model: PreTrainedModel,
    questions: Sequence[Question],
    capacity: int,
    score: Callable[[ScoringPack, torch.Tensor], list[Any]],
    share: Share,
) -> list[Any]:
    """Run every pack of the share; results in the questions' order, None for others."""
    _check_lengths(model, questions)
    results: list[Any] = [None] * len(questions)
    packs = share.of(list(pack_questions(questions, capacity=capacity)))
    with progress("scoring", sum(len(pack.numbers) for pack in packs)) as advance:
        for pack in packs:
            states = model.get_decoder()(
                input_ids=torch.tensor([pack.input_ids], device=model.device),
                position_ids=torch.tensor([pack.position_ids], device=model.device),
                attention_mask=None,
                use_cache=False,
                tree=Tree(forks=pack.tree.forks),  # whose masks go with this forward
            ).last_hidden_state[0]
            for i, result in zip(pack.numbers, score(pack, states), strict=True):
                results[i] = result
            advance(len(pack.numbers))
    return results


def _log_likelihoods(
    model: PreTrainedModel, states_TD: torch.Tensor, places: Sequence[int], targets: Sequence[int]
) -> list[float]:
    """log p(targets[k] | states_TD[places[k]]); logits of distinct places, a chunk of them at a time."""
    distinct = {place: row for row, place in enumerate(dict.fromkeys(places))}
    chunk = max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)
    rows = torch.tensor([distinct[place] for place in places], device=states_TD.device)
    wanted = torch.tensor(targets, device=states_TD.device)
    found = torch.empty(len(places), device=states_TD.device)
    states_KD = states_TD[torch.tensor(list(distinct), device=states_TD.device)]
    for start in range(0, len(distinct), chunk):
        logits = _vocabulary_logits(model, states_KD[start : start + chunk])
        here = (rows >= start) & (rows < start + chunk)
        found[here] = logits[rows[here] - start, wanted[here]] - logits.logsumexp(-1)[rows[here] - start]
    return found.tolist()
