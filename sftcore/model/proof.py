"""The proof that a model's weights train in packs as they compute alone, and refusals by name.

In: a model with per-document attention and the trained-token head. Out: nothing, or a `UserInputError`.
Invariant: two documents packed give the states that each gives alone; alone they give what transformers' own
attention gives; our head gives the model's own logits: in the dtype, backend and place of training.
Trade-off: six forwards of 5 to 12 tokens at every start (0.4 s for 270M on two cores). Gradients, and what
changes with a text's length, `trial` has shown on a miniature of the same code; only windows of at most 64
positions are crossed here: crossing 4,096 would cost minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from sftcore.batching.collate import Batch
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.heap import is_out_of_memory
from sftcore.model.forward import decode_states, output_head, pack_arguments, states_by_transformers
from sftcore.model.quantise import keep_trainable_layout
from sftcore.model.roles import is_routed

TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 1e-3}  # relative to the largest value
DOCUMENTS = (5, 7)  # tokens of the two
MAX_CROSSED_WINDOW = 64
BROKEN = (TypeError, LookupError, AttributeError, AssertionError, ValueError, ImportError)
ENVIRONMENT = (torch.AcceleratorError, torch.distributed.DistError)  # RuntimeErrors of devices and of ranks
NOT_PACKED = "can't train in packs"


def prove_head_and_packs(model: PreTrainedModel) -> None:
    """Check the trained-token head, the packing and the attention against the model itself.

    Raises:
        UserInputError: the head's logits differ from the model's (it edits logits in a way we don't know), a
            packed document's states differ from the document alone (it mixes documents), those differ from
            transformers' own (attention of a kind that we don't know), or it can't be run so.
        MissingEnvironmentError: it needs a package that is not installed.
    """
    was_training = model.training
    model.eval()
    keep_trainable_layout(model.modules())
    first, second = DOCUMENTS[0], max(DOCUMENTS[1], _crossing(model.config))
    ids = probe_ids(model.config, first + second).to(model.device)
    with refusing(model.config.model_type, NOT_PACKED), torch.no_grad():
        why = _difference(model, [first, second], ids)
    model.train(was_training)
    if why:
        raise unfit(model.config.model_type, f"{NOT_PACKED}: {why}")


def _difference(model: PreTrainedModel, lengths: list[int], ids_T: torch.Tensor) -> str:
    """In what the model is not what training takes it for, on two documents; empty if in nothing."""
    tolerance = TOLERANCES[model.dtype]
    documents = ids_T.split(lengths)
    states = decode_states(model, bare_batch(ids_T, lengths))
    one, other = (decode_states(model, bare_batch(ids, [len(ids)])) for ids in documents)
    own = model(**pack_arguments(bare_batch(documents[0], lengths[:1]))).logits.float()
    if not close(head_logits(model, one, own), own, tolerance):
        return "it changes its logits after the output layer in a way that the loss would miss"
    if not close(states, torch.cat([one, other], 1), tolerance):
        return "its layers mix documents of one pack (state-space or bidirectional layers do that)"
    if not computes_attention(model, documents, [one, other]):
        return "its attention is none of those that we compute (transformers' own gives other states)"
    return ""


def head_logits(model: PreTrainedModel, states_1TD: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """float32 logits by our head, in the shape of the model's `own`: a classifier gives a row a document."""
    head: Any = output_head(model)
    logits: torch.Tensor = head(states_1TD if own.ndim == 3 else states_1TD[:, -1]).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _crossing(config: Any) -> int:
    """Tokens of a document most of which lie beyond the sliding window, if that is a short one."""
    window = config.get_text_config().to_dict().get("sliding_window") or 0
    return 2 * window + 2 if window <= MAX_CROSSED_WINDOW else 0


def probe_ids(config: Any, count: int) -> torch.Tensor:
    """(count,) token ids, none of them the pad's: a classifier would take that for the document's end."""
    text = config.get_text_config()
    pad = text.to_dict().get("pad_token_id")
    ids = torch.arange(1, count + 1) * 7 % text.vocab_size
    return ids if pad is None else torch.where(ids == pad, (ids + 1) % text.vocab_size, ids)


def bare_batch(ids_T: torch.Tensor, documents: list[int]) -> Batch:
    """A batch of documents without targets."""
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=ids_T[None],
        position_ids=torch.cat([torch.arange(n, device=ids_T.device) for n in documents])[None],
        cu_seqlens=torch.tensor([0, *documents], device=ids_T.device).cumsum(0).int(),
        max_seqlen=max(documents),
        document_lengths=tuple(documents),
        trained_index=nothing,
        targets=nothing,
        weights=nothing.float(),
        num_tokens=len(ids_T),
    )


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal but for a share of the largest value."""
    scale = b.abs().max().clamp(min=1e-6)
    return bool(((a - b).abs().max() / scale) < tolerance)


def computes_attention(
    model: PreTrainedModel, documents: Sequence[torch.Tensor], states: Sequence[torch.Tensor]
) -> bool:
    """Whether transformers' own attention gives documents of token ids these states (1, T, D).

    In bfloat16 rounding alone can throw single tokens far off (logits of a tuned SmolLM2 by 7 % of the
    largest), so the middle one of those that see another is judged. It can also choose another expert for a
    token, which those after it see (of 30 models with 8 layers of 32 experts and random weights, 5 had most
    tokens off): after routers the token that differs least is judged.
    """
    offs = []
    for ids_T, ours_1TD in zip(documents, states, strict=True):
        own_1TD = states_by_transformers(model, ids_T)
        offs.append((ours_1TD - own_1TD)[0, 1:].abs().amax(-1).float() / own_1TD.abs().max().clamp(min=1e-6))
    off = torch.cat(offs)
    if model.dtype != torch.bfloat16:
        return bool(off.max() < TOLERANCES[model.dtype])
    return bool((off.min() if is_routed(model.config) else off.median()) < TOLERANCES[model.dtype])


@contextmanager
def refusing(model_type: str, what: str) -> Iterator[None]:
    """Refuse a model by name when its code breaks in the block.

    Args:
        what: can't be done with it.

    Raises:
        UserInputError: with the error's first line.
        MissingEnvironmentError: that line asks for a package; or there was no memory.
        RuntimeError: a device or a process group failed, which says nothing of the model.
    """
    try:
        yield
    except (*BROKEN, RuntimeError, MemoryError) as error:
        line = (str(error).strip() or "no message").splitlines()[0]
        if is_out_of_memory(error):
            raise MissingEnvironmentError(_no_memory(model_type, line)) from error
        if isinstance(error, ENVIRONMENT):
            raise
        lacks_package = isinstance(error, ImportError) or "nstall" in line
        raise unfit(
            model_type, f"{what}: {type(error).__name__}: {line}", lacks_package=lacks_package
        ) from error


def _no_memory(model_type: str, line: str) -> Problem:
    return Problem(
        what=f"out of memory while model type {model_type!r} was loaded and checked: {line[:160]}",
        where="model.path",
        remedy="see sftcore plan for what fits: deepspeed: zero3, adapter.kind: lora or qlora, more ranks",
    )


def unfit(
    model_type: str, what: str, *, lacks_package: bool = False
) -> UserInputError | MissingEnvironmentError:
    """The refusal of a model type."""
    problem = Problem(what=f"model type {model_type!r} {what}", where="model.path")
    return MissingEnvironmentError(problem) if lacks_package else UserInputError(problem)
