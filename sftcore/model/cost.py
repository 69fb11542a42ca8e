"""Cost: a model's configuration -> FLOPs of a pack, bytes of training state. The one owner of these numbers.

In: a transformers configuration. Out: `ModelCost`, from which the schedule balances ranks and the plan
predicts.
Invariant: counts come from the model itself, built on the meta device, not from a formula per architecture.
Trade-off: building on meta takes about 0.1 s for 30 layers and no memory, and is exact for any
architecture.

FLOPs of a forward and backward, 2 for each multiply-add, pads excluded:

    6 N_body tokens + 6 h V trained_tokens + 6 L h_attn sum(len_i^2)

the last term being the two causal products (half of 12 L h_attn len^2; PaLM, arXiv 2204.02311, appendix B).
Where a layer has a sliding window w, len^2 / 2 becomes the number of pairs in the band.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sftcore.batching.schedule import CostCoefficients
from sftcore.config import AdapterSettings, Recipe
from sftcore.model.adapter_files import vocabulary_trained
from sftcore.model.adapters import add_adapter
from sftcore.model.attention.needs import head_sizes
from sftcore.model.code import is_trusted
from sftcore.model.load import load_config
from sftcore.model.loss import columns_per_block
from sftcore.model.proof import refusing
from sftcore.model.reach import count_unreached
from sftcore.model.roles import count_active, count_quantised, hidden_matrices
from sftcore.model.saved import SavedBytes, saved_bytes
from sftcore.settings import NUM_CLASSES

FLOPS_PER_WEIGHT = 6  # 2 forward, 4 backward
FLOPS_PER_FROZEN_WEIGHT = 4  # 2 forward, 2 backward: only the gradient of its input
TRAINING_BYTES = 2  # bfloat16
MASTER_BYTES, MOMENT_BYTES, EIGHT_BIT_MOMENT_BYTES = 4, 8, 2  # a float32 weight; both moments of Adam
FOUR_BIT_BYTES = 0.516  # nf4 in blocks of 64 with 8-bit scales of 32-bit scales (QLoRA, arXiv 2305.14314)
FOLLOW_LENGTH = ("dynamic", "longrope")  # kinds of rotary positions that look at the text's length


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Sizes that costs follow from.

    Args:
        num_parameters: all, tied ones once.
        num_body_parameters: without input embedding and output layer.
        hidden_size: h.
        vocabulary: V, rows of the output layer.
        num_words: rows of the input embedding.
        num_layers: L.
        attention_width: h_attn = query heads * head size (half of keys and values, where they differ).
        num_banded_layers: those of the L with a sliding window.
        window: positions that those see; 0 if there are none.
        num_trained_parameters: all that texts reach, or an adapter's.
        num_active_parameters: of the body, those that a token meets: of experts, the chosen ones' share.
        num_active_trained_parameters: of the trained ones next to frozen weights, likewise.
        num_quantised_parameters: what QLoRA holds in 4 bits: weights of single linear layers.
        num_muon_parameters: the trained ones that Muon updates.
        num_unreached_parameters: those that no text reaches: loaded, and neither trained nor computed with.
        saved_bytes: what autograd keeps for backward of one token, in the training dtype: of all layers, of
            the most expensive layer, and of the layers' inputs alone.
        saved_bytes_called: the same where products of gated MLPs do more than multiply (`gates`).
    """

    num_parameters: int
    num_body_parameters: int
    hidden_size: int
    vocabulary: int
    num_words: int
    num_layers: int
    attention_width: int
    num_banded_layers: int
    window: int
    num_trained_parameters: int
    num_active_parameters: int
    num_active_trained_parameters: int
    num_quantised_parameters: int
    num_muon_parameters: int
    num_unreached_parameters: int
    saved_bytes: SavedBytes
    saved_bytes_called: SavedBytes

    @property
    def coefficients(self) -> CostCoefficients:
        """For balancing packs, in FLOPs: frozen weights have no gradient of their own, 4 instead of 6."""
        each = FLOPS_PER_WEIGHT if self.trains_all else FLOPS_PER_FROZEN_WEIGHT
        per_layer = FLOPS_PER_WEIGHT * self.attention_width
        others = 0 if self.trains_all else FLOPS_PER_WEIGHT * self.num_active_trained_parameters
        return CostCoefficients(
            per_token=each * self.num_active_parameters + others,
            per_square=per_layer * (self.num_layers - self.num_banded_layers),
            per_trained=each * self.hidden_size * self.vocabulary,
            per_banded_square=per_layer * self.num_banded_layers,
            window=self.window,
        )

    @property
    def trains_all(self) -> bool:
        """Whether no weight that a text reaches is frozen."""
        return self.num_trained_parameters == self.num_parameters - self.num_unreached_parameters

    def state_bytes_per_rank(
        self,
        *,
        stage: int,
        world: int,
        weight_bytes: int,
        quantised: bool = False,
        optimizer: str = "adamw",
        frozen_bytes: int | None = None,
    ) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state on each rank, without activations.

        ZeRO shards the optimizer state from stage 1, gradients from stage 2, weights from stage 3
        (arXiv 1910.02054); gradients are accumulated in float32. Frozen weights have neither.

        Args:
            quantised: linear layers' weights are held in 4 bits.
            optimizer: as in the recipe.
            frozen_bytes: of a weight next to an adapter, if not `weight_bytes`.
        """
        n = self.num_trained_parameters
        moments = EIGHT_BIT_MOMENT_BYTES if optimizer == "adamw-8bit" else MOMENT_BYTES
        master = MASTER_BYTES if weight_bytes < 4 else 0
        held = weight_bytes if self.trains_all or frozen_bytes is None else frozen_bytes
        weights: float = self.num_parameters * held
        if quantised:
            weights -= self.num_quantised_parameters * (held - FOUR_BIT_BYTES)
        weights += 0 if self.trains_all else n * weight_bytes
        state = n * (master + moments)
        if optimizer == "muon":  # one moment of the layers' matrices
            state -= self.num_muon_parameters * MOMENT_BYTES // 2
        return {
            "weights": int(weights) // (world if stage >= 3 else 1),
            "gradients": n * 4 // (world if stage >= 2 else 1),
            "optimizer": state // (world if stage >= 1 else 1),
        }

    def activation_bytes(self, num_tokens: int, *, is_recomputed: bool, calls_products: bool = False) -> int:
        """Kept for backward of a pack: all layers' tensors, or the layers' inputs and one layer's tensors.

        Args:
            calls_products: products gather their weights, or cast them.
        """
        saved = self.saved_bytes_called if calls_products else self.saved_bytes
        return num_tokens * (saved.inputs + saved.dearest_layer if is_recomputed else saved.all_layers)

    def head_bytes(self, num_tokens: int, *, is_summed: bool = False) -> int:
        """A block of float32 logits and its gradient; the projection's gradient, where it is trained.

        It is made in the training dtype while all activations are still there; where it is the embedding's,
        too, it waits through all of backward (`tied`).

        Args:
            is_summed: it is added to a sum block by block instead (`train.gradient_sums`).
        """
        columns = min(self.vocabulary, columns_per_block(num_tokens, self.hidden_size))
        block = 2 * 4 * num_tokens * columns
        each = TRAINING_BYTES if self.trains_all and not is_summed else 0
        return block + each * self.vocabulary * self.hidden_size


def measure_model(
    config: Any, adapter: AdapterSettings | None = None, *, num_classes: int | None = None
) -> ModelCost:
    """Count a model's parameters without making them.

    Args:
        config: a causal LM's transformers configuration.
        adapter: what is trained instead of all weights.
        num_classes: of a classifier in the vocabulary's place.

    Raises:
        UserInputError: its code can't be run on the meta device.
    """
    with refusing(config.model_type, "can't be counted"):
        return _measure(config, adapter, num_classes)


def _measure(config: Any, adapter: AdapterSettings | None, num_classes: int | None) -> ModelCost:
    kind = AutoModelForCausalLM if num_classes is None else AutoModelForSequenceClassification
    with torch.device("meta"):
        changed = _with_static_positions(config)
        model = kind.from_config(changed, trust_remote_code=is_trusted(config))
    output = model.get_output_embeddings()  # a classifier has none; its own few weights count as body
    outside = {
        id(p): p.numel()
        for p in (None if output is None else output.weight, model.get_input_embeddings().weight)
        if p is not None
    }
    total = sum(p.numel() for p in model.parameters())
    idle = count_unreached(model.named_parameters(), config, kind)
    text = config.get_text_config()
    banded, window = _sliding_windows(text)
    body = total - idle - sum(outside.values())
    active = count_active(model.named_parameters(), config) - idle - sum(outside.values())
    quantised = count_quantised(model)
    if adapter is not None and adapter.kind != "none":
        with torch.device("meta"):
            add_adapter(model, adapter, seed=0)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for _, p in named) - count_unreached(named, config, kind)
    return ModelCost(
        num_parameters=total,
        num_body_parameters=body,
        num_active_parameters=active,
        num_active_trained_parameters=count_active(named, config),
        num_quantised_parameters=quantised,
        num_muon_parameters=sum(p.numel() for p in hidden_matrices(model)),
        num_unreached_parameters=idle,
        hidden_size=text.hidden_size,
        vocabulary=num_classes or output.weight.shape[0],
        num_words=model.get_input_embeddings().weight.shape[0],
        num_layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * sum(head_sizes(config)) // 2,
        num_banded_layers=banded,
        window=window,
        num_trained_parameters=trained,
        saved_bytes=saved_bytes(model, config, kind, calls_products=False),
        saved_bytes_called=saved_bytes(model, config, kind, calls_products=True),
    )


def _with_static_positions(config: Any) -> Any:
    """The configuration without frequencies that follow a text's length, which nothing on meta has."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    for part in (rope, *rope.values()) if rope else ():
        if isinstance(part, dict) and part.get("rope_type") in FOLLOW_LENGTH:
            part["rope_type"] = "default"
    return changed


def _sliding_windows(text: Any) -> tuple[int, int]:
    """How many layers have a sliding window, and its positions."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    banded = kinds.count("sliding_attention") if window else 0
    return banded, int(window or 0)


def measure_recipe(recipe: Recipe) -> ModelCost:
    """Sizes of the recipe's model."""
    num_classes = NUM_CLASSES if recipe.classifies else None
    cost = measure_model(load_config(recipe.model), recipe.adapter, num_classes=num_classes)
    saved = recipe.train.init_adapter
    has_vocabulary = bool(recipe.model.add_tokens) or (saved and vocabulary_trained(Path(saved)))
    if cost.trains_all or not has_vocabulary:
        return cost
    others = (
        cost.num_parameters - cost.num_unreached_parameters - cost.num_body_parameters
    )  # the vocabulary is trained with the adapter
    return replace(cost, num_trained_parameters=cost.num_trained_parameters + others)
