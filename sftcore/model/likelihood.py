"""Scoring prompts and continuations in packs: nothing that several of them share is computed twice.

In: prompts and their continuations as token ids, a model loaded by `load_for_scoring`. Out: log-likelihoods
of the continuations, or a classifier's logits, in the prompts' order.
Invariant: in float32 equal to each prompt with each continuation alone, whatever the packs.
Trade-off: prompts are ordered by length, so that those of a pack have few shapes (attention runs once a shape
and layer: 5 instead of 60 calls for 200 short pairs), and results are put back in order; what all prompts
begin with is computed once a pack, not once a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sftcore.config import ModelSettings
from sftcore.dist import WHOLE, Share
from sftcore.errors import Problem, UserInputError
from sftcore.log import progress
from sftcore.model.adapters import CLASSIFIER
from sftcore.model.attention.needs import needs_of
from sftcore.model.attention.tree import Fork, Tree, lacks, positions, register_tree_attention
from sftcore.model.classifier import restore_classifier
from sftcore.model.load import load_for_decoding
from sftcore.model.loss import CHUNK_ELEMENTS

PACK_TOKENS = 4096
PROBE_TOLERANCE = 5e-2  # of logits, relative to the largest: bfloat16's rounding
Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and the continuations that are compared behind it (none: its last state is classified)."""

    prompt: Ids
    continuations: tuple[Ids, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPack:
    """Questions laid out as a tree.

    Args:
        numbers: which questions these are.
        input_ids: (T,) prefix, then each prompt's rest and its continuations without their last token.
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
    """Questions in packs of at most `capacity` tokens (a longer question gets one of its own)."""
    prefix = shared_prefix([question.prompt for question in questions])
    forks = [_fork_of(question, len(prefix)) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (forks[i].trunk, forks[i].branches, i))
    numbers: list[int] = []
    filled = len(prefix)
    for i in order:
        if numbers and filled + forks[i].num_tokens > capacity:
            yield _lay_out(questions, forks, numbers, prefix)
            numbers, filled = [], len(prefix)
        numbers.append(i)
        filled += forks[i].num_tokens
    if numbers:
        yield _lay_out(questions, forks, numbers, prefix)


def shared_prefix(prompts: Sequence[Ids]) -> list[int]:
    """What all prompts begin with, but for the last token of each.

    >>> shared_prefix([[1, 2, 3], [1, 2, 4], [1, 2]])
    [1]
    """
    return list(commonprefix([list(prompt[:-1]) for prompt in prompts]))


def _fork_of(question: Question, prefix: int) -> Fork:
    branches = tuple(len(continuation) - 1 for continuation in question.continuations)
    return Fork(trunk=len(question.prompt) - prefix, branches=branches)


def _lay_out(
    questions: Sequence[Question], forks: Sequence[Fork], numbers: list[int], prefix: list[int]
) -> ScoringPack:
    ids, at, asked = list(prefix), list(range(len(prefix))), []
    for i in numbers:
        question, fork = questions[i], forks[i]
        last = len(ids) + fork.trunk - 1
        ids += question.prompt[len(prefix) :]
        places = []
        for continuation in question.continuations:
            places.append([last, *range(len(ids), len(ids) + len(continuation) - 1)])
            ids += continuation[:-1]
        asked.append(places or [[last]])
        at += positions(fork, len(prefix))
    tree = Tree(prefix=len(prefix), forks=tuple(forks[i] for i in numbers))
    return ScoringPack(numbers=numbers, input_ids=ids, position_ids=at, tree=tree, asked=asked)


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
    attention = register_tree_attention()
    model = load_for_decoding(settings, quantised=quantised, attention=attention, kind=kind)
    if classifies:
        restore_classifier(model, Path(settings.path))
    if reasons := lacks(needs_of(model.config, dtype=settings.dtype, device=model.device.type)):
        raise UserInputError(_unfit(settings, ", ".join(reasons)))
    if not classifies and not _logits_agree(model):
        raise UserInputError(_unfit(settings, "it changes its logits in a way that the scores would miss"))
    return model


def _unfit(settings: ModelSettings, why: str) -> Problem:
    remedy = "set matching.predict: generate"
    return Problem(what=f"labels can't be scored with this model: {why}", where=settings.path, remedy=remedy)


@torch.inference_mode()
def _logits_agree(model: PreTrainedModel) -> bool:
    """Whether our way from states to logits is the model's own, on five tokens."""
    ids = torch.arange(1, 6, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size
    tree = Tree(prefix=0, forks=(Fork(trunk=5),))
    own = model(input_ids=ids, tree=tree, use_cache=False).logits.float()
    states = model.get_decoder()(input_ids=ids, tree=tree, use_cache=False).last_hidden_state
    ours = _vocabulary_logits(model, states)
    return bool((ours - own).abs().max() <= PROBE_TOLERANCE * own.abs().max())


def _vocabulary_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """(..., V) float32 from (..., D)."""
    head: Any = model.get_output_embeddings()
    logits: torch.Tensor = head(states).float()
    softcap = model.config.get_text_config().to_dict().get("final_logit_softcapping")
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def continuation_scores(
    model: PreTrainedModel,
    questions: Sequence[Question],
    *,
    capacity: int = PACK_TOKENS,
    share: Share = WHOLE,
) -> list[Any]:
    """Per question and continuation: the log-likelihood of each of its tokens, in nats.

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
    """(N, D) mean over each prompt's tokens, the shared prefix among them; summed in float32."""
    prefix = pack.tree.prefix
    shared_D = states_TD[:prefix].float().sum(0)
    means = []
    for fork, (place,) in zip(pack.tree.forks, pack.asked, strict=True):
        own_D = states_TD[place[0] + 1 - fork.trunk : place[0] + 1].float().sum(0)
        means.append((shared_D + own_D) / (prefix + fork.trunk))
    return torch.stack(means).to(states_TD.dtype)


@torch.inference_mode()
def _for_all(
    model: PreTrainedModel,
    questions: Sequence[Question],
    capacity: int,
    score: Callable[[ScoringPack, torch.Tensor], list[Any]],
    share: Share,
) -> list[Any]:
    """Run every pack of the share; results in the questions' order, None for others."""
    results: list[Any] = [None] * len(questions)
    packs = share.of(list(pack_questions(questions, capacity=capacity)))
    with progress("scoring", sum(len(pack.numbers) for pack in packs)) as advance:
        for pack in packs:
            states = model.get_decoder()(
                input_ids=torch.tensor([pack.input_ids], device=model.device),
                position_ids=torch.tensor([pack.position_ids], device=model.device),
                attention_mask=None,
                use_cache=False,
                tree=pack.tree,
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
        logits = torch.log_softmax(_vocabulary_logits(model, states_KD[start : start + chunk]), -1)
        here = (rows >= start) & (rows < start + chunk)
        found[here] = logits[rows[here] - start, wanted[here]]
    return found.tolist()
