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
import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from sftcore.batching.schedule import CostCoefficients
from sftcore.config import AdapterSettings, Recipe
from sftcore.model.adapters import add_adapter
from sftcore.model.attention.needs import head_sizes
from sftcore.model.code import is_trusted
from sftcore.model.load import load_config
from sftcore.model.loss import columns_per_block
from sftcore.model.miniature import build, shrink
from sftcore.model.ours import slim_layers
from sftcore.model.proof import refusing
from sftcore.model.reach import count_unreached
from sftcore.settings import NUM_CLASSES

FLOPS_PER_WEIGHT = 6  # 2 forward, 4 backward
FLOPS_PER_FROZEN_WEIGHT = 4  # 2 forward, 2 backward: only the gradient of its input
TRAINING_BYTES = 2  # bfloat16
MASTER_BYTES, MOMENT_BYTES, EIGHT_BIT_MOMENT_BYTES = 4, 8, 2  # a float32 weight; both moments of Adam
FOUR_BIT_BYTES = 0.516  # nf4 in blocks of 64 with 8-bit scales of 32-bit scales (QLoRA, arXiv 2305.14314)
COUNTED_TOKENS = 64
COUNTED = "sftcore_counted"
FOLLOW_LENGTH = ("dynamic", "longrope")  # kinds of rotary positions that look at the text's length
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedBytes:
    """Bytes that autograd keeps of one token."""

    all_layers: int
    dearest_layer: int
    inputs: int


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
        num_unreached_parameters: those that no text reaches: loaded, and neither trained nor computed with.
        saved_bytes: what autograd keeps for backward of one token, in the training dtype: of all layers, of
            the dearest layer, and of the layers' inputs alone.
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
    num_unreached_parameters: int
    saved_bytes: SavedBytes
    saved_bytes_called: SavedBytes

    @property
    def coefficients(self) -> CostCoefficients:
        """For balancing packs, in FLOPs: frozen weights have no gradient of their own, 4 instead of 6."""
        each = FLOPS_PER_WEIGHT if self.trains_all else FLOPS_PER_FROZEN_WEIGHT
        per_layer = FLOPS_PER_WEIGHT * self.attention_width
        beside = 0 if self.trains_all else FLOPS_PER_WEIGHT * self.num_trained_parameters
        return CostCoefficients(
            per_token=each * self.num_body_parameters + beside,
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
            quantised: the layers' weights are held in 4 bits.
            optimizer: as in the recipe.
            frozen_bytes: of a weight beside an adapter, if not `weight_bytes`.
        """
        n = self.num_trained_parameters
        moments = EIGHT_BIT_MOMENT_BYTES if optimizer == "adamw-8bit" else MOMENT_BYTES
        master = MASTER_BYTES if weight_bytes < 4 else 0
        held = weight_bytes if self.trains_all or frozen_bytes is None else frozen_bytes
        weights: float = self.num_parameters * held
        if quantised:
            weights -= self.num_body_parameters * (held - FOUR_BIT_BYTES)
        weights += 0 if self.trains_all else n * weight_bytes
        state = n * (master + moments)
        if optimizer == "muon":  # one moment of the layers' matrices
            state -= (self.num_body_parameters if self.trains_all else n) * MOMENT_BYTES // 2
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
    trained = (
        total - idle if adapter is None or adapter.kind == "none" else _adapter_parameters(model, adapter)
    )
    return ModelCost(
        num_parameters=total,
        num_body_parameters=total - idle - sum(outside.values()),
        num_unreached_parameters=idle,
        hidden_size=text.hidden_size,
        vocabulary=num_classes or output.weight.shape[0],
        num_words=model.get_input_embeddings().weight.shape[0],
        num_layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * sum(head_sizes(config)) // 2,
        num_banded_layers=banded,
        window=window,
        num_trained_parameters=trained,
        saved_bytes=_saved_bytes(model, config, kind, calls_products=False),
        saved_bytes_called=_saved_bytes(model, config, kind, calls_products=True),
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


def _saved_bytes(model: Any, config: Any, kind: Any, *, calls_products: bool) -> SavedBytes:
    """`count_saved_bytes` on meta; where code reads values, a miniature's, scaled by width and depth."""
    try:
        return count_saved_bytes(model, calls_products=calls_products)
    except RuntimeError as error:
        log.info("%s is counted on a miniature: %s", config.model_type, str(error).splitlines()[0])
    small = shrink(config)
    saved = count_saved_bytes(build(small, kind), calls_products=calls_products)
    text, small_text = config.get_text_config(), small.get_text_config()
    width = text.hidden_size / small_text.hidden_size
    depth = text.num_hidden_layers / small_text.num_hidden_layers
    return SavedBytes(
        all_layers=int(saved.all_layers * width * depth),
        dearest_layer=int(saved.dearest_layer * width),
        inputs=int(saved.inputs * width * depth),
    )


def _sliding_windows(text: Any) -> tuple[int, int]:
    """How many layers have a sliding window, and its positions."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    banded = kinds.count("sliding_attention") if window else 0
    return banded, int(window or 0)


class _CountedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: queries, keys, values, output, and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_zeros(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # laid out as kernels do
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("counted, not computed")


def _counted_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _CountedAttention.apply(query, key, value).transpose(1, 2), None


def count_saved_bytes(model: Any, *, calls_products: bool = False) -> SavedBytes:
    """What autograd keeps per token of a forward, by running one on the meta device.

    Args:
        model: a causal LM, on the meta device where its code reads no values; it is converted to bfloat16.
        calls_products: give every product a hook, as ZeRO-3 does.
    """
    AttentionInterface.register(COUNTED, _counted_attention)  # without a mask of that name none is made
    model.to(torch.bfloat16).train().set_attn_implementation(COUNTED)
    slim_layers(model)
    products = [m for m in model.modules() if calls_products and type(m) is torch.nn.Linear]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors stay, so that no identity is used twice
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    marks: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    hooks = [layer.register_forward_pre_hook(lambda *_: marks.append(total())) for layer in layers]
    hooks += [product.register_forward_hook(lambda *_: None) for product in products]
    ids = torch.ones(1, COUNTED_TOKENS, dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state = model.get_decoder()(
            input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False
        ).last_hidden_state
    for hook in hooks:
        hook.remove()
    each = [after - before for before, after in pairwise([*marks, total()])]
    return SavedBytes(
        all_layers=total() // COUNTED_TOKENS,
        dearest_layer=max(each, default=0) // COUNTED_TOKENS,
        inputs=len(layers) * state.element_size() * state.shape[-1],
    )


def measure_recipe(recipe: Recipe) -> ModelCost:
    """Sizes of the recipe's model."""
    num_classes = NUM_CLASSES if recipe.classifies else None
    cost = measure_model(load_config(recipe.model), recipe.adapter, num_classes=num_classes)
    if cost.trains_all or not recipe.model.add_tokens:
        return cost
    beside = cost.num_parameters - cost.num_body_parameters  # the vocabulary is trained with the adapter
    return replace(cost, num_trained_parameters=cost.num_trained_parameters + beside)


def _adapter_parameters(model: Any, adapter: AdapterSettings) -> int:
    """Trained parameters of an adapter on a model that lies on the meta device."""
    with torch.device("meta"):
        add_adapter(model, adapter, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
