"""What a generator is asked and what it answers, and the one loop over batches of prompts.

In: prompts, a `Decoding`. Out: replies, batch by batch as they are there.
Invariant: batches are a pure function of the list of prompts (`batches_by_length`), so ranks, shards and
resumed runs decode the same.
Trade-off: a batch is of prompts of like length, so their order is not the callers'; replies come with the
prompt's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from sftcore.log import progress
from sftcore.shares import WHOLE, Share

Ids = Sequence[int]
IsDone = Callable[[Sequence[int], Sequence[list[int]]], Sequence[bool]]
P_contra = TypeVar("P_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoding:
    """How prompts are completed.

    Args:
        max_new_tokens: of a completion.
        temperature: divides the logits; 0: greedy.
        uniforms: (prompts * completions_per_prompt, max_new_tokens) float64 in [0, 1), a row a completion:
            what our own engine samples by.
        seeds: one a prompt: what an engine samples by that draws for itself.
        stop_ids: a completion ends before the first of these, or of the model's own.
        completions_per_prompt: of each prompt.
        is_done: is_done(prompt numbers, tokens so far) says which of these end early; our own engine calls it
            after every token, once for all completions that have gone the same way.
    """

    max_new_tokens: int
    temperature: float = 0.0
    uniforms: np.ndarray | None = None
    seeds: Sequence[int] | None = None
    stop_ids: frozenset[int] = frozenset()
    completions_per_prompt: int = 1
    is_done: IsDone | None = None

    def of(self, prompts: Sequence[int]) -> Decoding:
        """The same, of these prompts alone.

        >>> decoding = Decoding(max_new_tokens=1, uniforms=np.arange(6.0)[:, None], completions_per_prompt=2)
        >>> decoding.of([2, 0]).uniforms[:, 0].tolist()
        [4.0, 5.0, 0.0, 1.0]
        """
        n = self.completions_per_prompt
        rows = [p * n + k for p in prompts for k in range(n)]
        uniforms = None if self.uniforms is None else self.uniforms[rows]
        return replace(self, uniforms=uniforms, seeds=self.seeds and [self.seeds[p] for p in prompts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A completion, without the special tokens that end it.

    Args:
        text: what was written.
        num_input_tokens: of the prompt.
        num_output_tokens: of the text.
    """

    text: str
    num_input_tokens: int = 0
    num_output_tokens: int = 0


def reply_of(tokenizer: Any, prompt: Ids, tokens: Ids) -> Reply:
    """A completion as text."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return Reply(text=text, num_input_tokens=len(prompt), num_output_tokens=len(tokens))


class Generator(Protocol[P_contra, R_co]):
    """What completes prompts: token ids, or texts where a server has the tokenizer."""

    def complete(self, prompts: Sequence[P_contra], decoding: Decoding) -> Sequence[Sequence[R_co]]:
        """The replies to each prompt, `completions_per_prompt` of them."""
        ...


class Scorer(Protocol):
    """What says how likely given continuations are."""

    def score(
        self, prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], *, temperature: float = 1.0
    ) -> Sequence[Sequence[float]]:
        """Log-probability of each continuation of each prompt, in nats."""
        ...


def batches_by_length(prompts: Sequence[Ids], *, prompts_per_batch: int) -> list[list[int]]:
    """Prompt numbers, shortest first, in batches; equal lengths keep their order.

    >>> batches_by_length([[1, 2, 3], [1], [1, 2]], prompts_per_batch=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + prompts_per_batch] for i in range(0, len(order), prompts_per_batch)]


def complete_all(
    generator: Generator[Ids, R],
    prompts: Sequence[Ids],
    decoding: Decoding,
    *,
    prompts_per_batch: int,
    label: str,
    share: Share = WHOLE,
) -> Iterator[tuple[int, Sequence[R]]]:
    """The number of each prompt of a share and the replies to it, with their progress, as they come."""
    batches = share.of(batches_by_length(prompts, prompts_per_batch=prompts_per_batch))
    with progress(label, sum(map(len, batches))) as advance:
        for batch in batches:
            found = generator.complete([prompts[i] for i in batch], decoding.of(batch))
            yield from zip(batch, found, strict=True)
            advance(len(batch))
