"""A model made ours: slim layers, the trained-token head, activations that are computed again.

In: a transformers model with per-document attention. Out: the same model as it trains, or a refusal by name.
Invariant: real models and miniatures are made ours by the same functions: what is proven is what runs.
Trade-off: layers are changed in place, which is quick and needs no second model, and can't be undone.
"""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel

from sftcore.errors import Problem, UserInputError
from sftcore.model.forward import output_head
from sftcore.model.gates import slim_gates
from sftcore.model.loss import TrainedTokenHead
from sftcore.model.norms import slim_norms
from sftcore.model.proof import NOT_PACKED, unfit


def slim_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Let norms and gated MLPs keep less for backward; how many do. Call it once for a model."""
    return slim_norms(model), slim_gates(model)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for backward and compute the rest again.

    Never torch's older, reentrant way: what layers hand on to later ones past the hidden states (keys and
    values in Gemma 3n and 4) gets no gradient there, in silence. The newer one compares what is kept with
    what is computed again, and finds weights that ZeRO-3 has cut up in between: hence no comparison.

    Raises:
        UserInputError: the model's code can't do it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserInputError(
            Problem(
                what=f"model type {model.config.model_type!r} can't compute activations again",
                where="train.activation_checkpointing",
                got="full",
                remedy="set train.activation_checkpointing: none",
            )
        )
    options = {"use_reentrant": False, "determinism_check": "none"}
    with warnings.catch_warnings():  # transformers 5.23 has a new name for it, which 5.17 has not
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def install_head(model: PreTrainedModel, *, z_loss: float, label_smoothing: float, kind: str) -> None:
    """Put the trained-token head in the place of the output layer, with its weights.

    Args:
        kind: as `choose_head` gives it.

    Raises:
        UserInputError: the output layer is not linear.
    """
    linear = output_head(model)
    if not isinstance(linear, nn.Linear):
        what = f"{NOT_PACKED}: its output layer is a {type(linear).__name__}, not a linear layer"
        raise unfit(model.config.model_type, what)
    is_causal_lm = model.get_output_embeddings() is not None
    text = model.config.get_text_config().to_dict()
    head = TrainedTokenHead.from_linear(
        linear,
        softcap=text.get("final_logit_softcapping") if is_causal_lm else None,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        kind=kind,
    )
    if is_causal_lm:
        model.set_output_embeddings(head)
    else:
        model.score = head
