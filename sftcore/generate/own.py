"""Our own generator: a transformers model, decoded with shared prefixes, scored in packs.

In: a model and its tokenizer. Out: `Generator` and `Scorer`.
Invariant: as `decode` and `score` say: numbers depend on the batch and on nothing else.
Trade-off: the whole batch ends with its longest completion; `is_done` ends those early that are decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from sftcore.generate.api import Decoding, Ids, Reply, reply_of
from sftcore.generate.decode import decode_batch, stop_ids
from sftcore.generate.score import Question, score_questions
from sftcore.shares import WHOLE, Share


@dataclass(frozen=True, slots=True)
class OwnGenerator:
    """A model in this process.

    Args:
        model: as `load_for_decoding` gives it, or, to score in packs, `load_for_scoring`.
        tokenizer: the model's.
    """

    model: PreTrainedModel
    tokenizer: Any

    def complete(self, prompts: Sequence[Ids], decoding: Decoding) -> list[list[Reply]]:
        """The replies to each prompt; all of them are decoded together."""
        stops = decoding.stop_ids | stop_ids(self.model, self.tokenizer)
        completions = iter(decode_batch(self.model, prompts, replace(decoding, stop_ids=stops)))
        return [
            [
                reply_of(self.tokenizer, prompt, next(completions))
                for _ in range(decoding.completions_per_prompt)
            ]
            for prompt in prompts
        ]

    def score(
        self,
        prompts: Sequence[Ids],
        continuations: Sequence[Sequence[Ids]],
        *,
        temperature: float = 1.0,
        share: Share = WHOLE,
    ) -> list[Any]:
        """Log-probability of each continuation of each prompt, in nats; None in another job's share."""
        both = zip(prompts, continuations, strict=True)
        questions = [Question(prompt=prompt, continuations=tuple(asked)) for prompt, asked in both]
        return score_questions(self.model, questions, temperature=temperature, share=share)
