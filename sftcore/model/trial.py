"""A trial: a model's code, run on a miniature in packs and as training runs it, before any weight is read.

In: a configuration, the longest text, how it is to be trained. Out: nothing, or a `UserInputError` with the
reason.
Invariant: a pack's states and gradients are those of its documents alone under transformers' own attention,
with documents on either side of every length at which the model computes otherwise and texts reach.
Trade-off: two miniatures, three documents of 5 to 13 tokens, forward and backward: 0.05 to 0.4 s for any
architecture, on a CPU, in float32. The dtype, the backend and the weights themselves are left to `proof`,
and so is all where a miniature doesn't build.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from sftcore.config import Recipe
from sftcore.errors import Problem, SftError, UserInputError
from sftcore.model.attention.reference import reference_attention, register_reference_attention
from sftcore.model.forward import decode_states
from sftcore.model.miniature import BELOW, BEYOND, BREAKS, FAR, build, lengths_of, shrink
from sftcore.model.ours import checkpoint_activations, install_head, slim_layers
from sftcore.model.proof import NOT_PACKED, bare_batch, close, head_logits, probe_ids, unfit

log = logging.getLogger(__name__)
LENGTHS = [BELOW, BEYOND, BELOW + 2]
TOLERANCE = 1e-3
CHANGES_LOGITS = "it changes its logits after the output layer in a way that the loss would miss"
ITS_OWN = (
    "it computes attention in code of its own (ALiBi's, say) and not through transformers' interface: "
    "documents would mix"
)
HANDS_NOTHING = "its layers don't tell their attention which documents a pack holds"
CARRIES = (
    "its layers mix documents of one pack: some carry a state from token to token "
    "(state-space, recurrent, linear or convolution layers)"
)
COUNTS_ON = "it counts positions through a pack and not from each document's first token"
OTHER = "its attention is none of those that we compute (transformers' own gives other states)"
HAS_MASK = "its layers compute with an attention mask (sparse attention, ALiBi), and packs have none"
UNDIVIDED = "transformers does not run its decoder apart from its output layer"
GRADIENTS = "its gradients in packs are others than those of its documents alone"

_TRIED: set[str] = set()  # configurations and ways that passed in this process
_BOUNDS: dict[str, int | None] = {}  # of configurations


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a model is to be run.

    Args:
        longest: tokens of the longest text.
        checkpoints: whether activations are computed again in backward.
        kind: the Auto class.
    """

    longest: int
    checkpoints: bool = False
    kind: Any = AutoModelForCausalLM

    @classmethod
    def of(cls, recipe: Recipe, *, kind: Any) -> Way:
        """As a recipe trains a model of an Auto class."""
        return cls(
            longest=recipe.max_length,
            checkpoints=recipe.train.activation_checkpointing == "full",
            kind=kind,
        )


def try_code(config: Any, way: Way) -> None:
    """Refuse a model whose code gives packs other states or gradients than documents alone.

    Raises:
        UserInputError: with the reason; where shorter texts would be right, with the length up to which.
        MissingEnvironmentError: it needs a package that is not installed.
    """
    key = f"{config.to_json_string(use_diff=False)} {way}"
    if key in _TRIED:
        return
    error = _error_of(config, way)
    if error is None:
        _TRIED.add(key)
        return
    length = _right_up_to(config, way)
    if length is not None:
        raise UserInputError(_too_long(config, length, way.longest)) from error
    raise error


def bound_length(config: Any) -> int | None:
    """Tokens up to which texts don't change what is computed for others in a forward; None: without end.

    None, too, where they mix at any length.
    """
    way = Way(longest=FAR)
    key = config.to_json_string(use_diff=False)
    if key not in _BOUNDS:
        is_bound = bool(lengths_of(config)) and _error_of(config, way) is not None
        _BOUNDS[key] = _right_up_to(config, way) if is_bound else None
    return _BOUNDS[key]


def _right_up_to(config: Any, way: Way) -> int | None:
    """The largest length of the configuration up to which packs are right; None if there is none."""
    reached = {size for size in lengths_of(config).values() if size < way.longest}
    return next(
        (n for n in sorted(reached)[::-1] if _error_of(config, replace(way, longest=n)) is None), None
    )


def _too_long(config: Any, length: int, longest: int) -> Problem:
    named = ", ".join(f"{key}: {size}" for key, size in lengths_of(config).items() if size == length)
    return Problem(
        what=f"model type {config.model_type!r} {NOT_PACKED} of texts on both sides of {named}",
        where="data.max_length",
        got=str(longest),
        allowed=f"at most {length}",
        remedy=f"set data.max_length: {length}",
    )


@torch.inference_mode(False)
@torch.enable_grad()
def _error_of(config: Any, way: Way) -> SftError | None:
    """The refusal of a configuration's miniature; None if packs are right, or if it can't be built."""
    try:
        config = shrink(config, longest=way.longest)
        own = build(config, way.kind, attn_implementation="eager").train()
        own(**_arguments(_ids(config)))
    except BREAKS as error:
        log.info(
            "no miniature of %s (%s: %s): its weights alone are tried",
            config.model_type,
            type(error).__name__,
            error,
        )
        return None
    try:
        why = _compare(own, config, way)
    except SftError as error:
        return error
    what = f"{NOT_PACKED}: {why}"
    return unfit(config.model_type, what, lacks_package="nstall" in why) if why else None


@dataclass(slots=True, kw_only=True)
class _Run:
    """What a model gave: states (1, T, D), gradients of its weights, logits of single documents."""

    states: torch.Tensor
    gradients: dict[str, torch.Tensor]
    logits: tuple[torch.Tensor, ...] = ()


def _ids(config: Any) -> torch.Tensor:
    return probe_ids(config, sum(LENGTHS))


def _arguments(ids: torch.Tensor) -> dict[str, Any]:
    """Of a document alone."""
    return {"input_ids": ids[None], "position_ids": torch.arange(len(ids))[None], "use_cache": False}


def _run_alone(model: PreTrainedModel) -> _Run:
    """Each document alone, by transformers' own code and attention."""
    states, logits = [], []
    for ids in _ids(model.config).split(LENGTHS):
        states.append(model.get_decoder()(**_arguments(ids)).last_hidden_state)
        with torch.no_grad():
            logits.append(model(**_arguments(ids)).logits)
    return _with_gradients(model, torch.cat(states, 1), tuple(logits))


def _with_gradients(model: PreTrainedModel, states: torch.Tensor, logits: tuple[Any, ...] = ()) -> _Run:
    """Gradients of the states' product with fixed numbers."""
    numbers = torch.linspace(-1, 1, states.numel()).view_as(states)
    (states * numbers.sin()).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _Run(states=states.detach(), gradients=found, logits=logits)


def _compare(own: PreTrainedModel, config: Any, way: Way) -> str:
    """Why training would get this model wrong; empty if it would not."""
    try:
        alone = _run_alone(own)
    except BREAKS:
        return UNDIVIDED
    calls: list[int] = []
    try:
        ours = _make_ours(own, config, way, calls)
        packed = decode_states(ours, bare_batch(_ids(config), LENGTHS))
    except BREAKS as error:
        return _why_broken(error, own, calls)
    if not close(packed, alone.states, TOLERANCE):
        return _why_other(ours, alone, calls)
    if not _has_own_logits(ours, alone):
        return CHANGES_LOGITS
    found = _with_gradients(ours, packed).gradients
    wrong = [name for name, wanted in alone.gradients.items() if not _agrees(found.get(name), wanted)]
    return f"{GRADIENTS} ({wrong[0]})" if wrong else ""


def _make_ours(own: PreTrainedModel, config: Any, way: Way, calls: list[int]) -> PreTrainedModel:
    """The same weights as training has them; `calls` gets an entry for each call of our attention."""
    name = register_reference_attention()

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return reference_attention(*arguments, **named)

    AttentionInterface.register(name, counted)
    ours = build(config, way.kind, attn_implementation=name)
    ours.load_state_dict(own.state_dict())
    slim_layers(ours)
    install_head(ours, z_loss=0.0, label_smoothing=0.0, kind="chunked")
    if way.checkpoints:
        checkpoint_activations(ours)
    return ours.train()


@torch.no_grad()
def _has_own_logits(ours: PreTrainedModel, alone: _Run) -> bool:
    states = alone.states.split(LENGTHS, 1)
    return all(
        close(head_logits(ours, state, own), own, TOLERANCE)
        for state, own in zip(states, alone.logits, strict=True)
    )


def _agrees(found: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    if found is None:
        return not bool(wanted.any())
    return float((found - wanted).norm()) <= TOLERANCE * max(float(wanted.norm()), TOLERANCE)


def _why_broken(error: Exception, own: PreTrainedModel, calls: list[int]) -> str:
    """In words, why code that runs by itself breaks in a pack."""
    line = (str(error).strip() or "no message").splitlines()[0]
    if "document_lengths" in line:
        return HANDS_NOTHING
    if isinstance(error, ValueError) or "nstall" in line:
        return line
    if not _has_attention(own):
        return CARRIES
    if "NoneType" in line:
        return HAS_MASK
    return f"{ITS_OWN} ({type(error).__name__}: {line})" if not calls else f"{type(error).__name__}: {line}"


def _has_attention(model: PreTrainedModel) -> bool:
    """Whether a model has heads of attention; RWKV calls its recurrence so, and has none."""
    text = model.config.get_text_config()
    has_heads = text.attribute_map.get("num_attention_heads", "num_attention_heads") in text.to_dict()
    return has_heads and any("Attention" in type(m).__name__ for m in model.modules())


@torch.no_grad()
def _why_other(ours: PreTrainedModel, alone: _Run, calls: list[int]) -> str:
    """Why a pack's states are not those of its documents."""
    if not calls:
        return ITS_OWN if _has_attention(ours) else CARRIES
    ids = _ids(ours.config)
    lone = [decode_states(ours, bare_batch(part, [len(part)])) for part in ids.split(LENGTHS)]
    if not close(torch.cat(lone, 1), alone.states, TOLERANCE):
        return OTHER
    before = decode_states(ours, bare_batch(ids, LENGTHS))[:, BELOW:]
    ids[:BELOW] = ids[:BELOW].flip(0)
    after = decode_states(ours, bare_batch(ids, LENGTHS))[:, BELOW:]
    return COUNTS_ON if close(after, before, TOLERANCE) else CARRIES
