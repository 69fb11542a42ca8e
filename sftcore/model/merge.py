"""Merging: a base model's files + an adapter -> a whole Hugging Face folder, one shard after another.

In: the base's model section, the adapter folder, whether the base was held in 4 bits.
Out: a folder that plain transformers loads, with the logits of base and adapter together.
Invariant: the merged folder gives the logits of base and adapter, which are compared where memory allows,
else nothing is written; every adapter weight is used exactly once.
Trade-off: where weights have one name in the base's files and in the model, they are read and written from
file to file: peak memory is one shard and one layer in float32 (5 GB for shards of 5 GB, whatever the model's
size). Else (fused experts, transposed or renamed weights) the model is held once, by `fold`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from sftcore.config import ModelSettings
from sftcore.fsio import read_json, write_json
from sftcore.model.adapter_files import ADAPTER_WEIGHTS, PREFIX, adapter_values, is_update
from sftcore.model.adapters import CLASSIFIER, CLASSIFIES, merge_weight
from sftcore.model.code import copy_code
from sftcore.model.fold import check_logits, fold_model, logits_with_adapter
from sftcore.model.identity import GENERATION_CONFIG, TERMS, TOKENIZERS, copy_files
from sftcore.model.kept import kept_pattern
from sftcore.model.quantise import quantisation_settings, round_trip
from sftcore.model.weight_files import check_weight_files
from sftcore.model.weights import SHARD_BYTES, Named, Span, model_folder, read_spans, shards_of, write_shards
from sftcore.precision import torch_dtype
from sftcore.settings import MATCHING_FILE

ODD_KEYS = (  # of adapter_config.json: more than W + s B A for whole linear layers
    *("target_parameters", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config"),
)
BASE_FILES = "model*.safetensors"  # not what some models have next to them, in another form


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is done to each weight of the base.

    Args:
        config: adapter_config.json.
        parts: base weight's name -> {lora_A, lora_B, lora_magnitude_vector} -> tensor.
        whole: name -> a weight that was trained whole and takes the base's place.
        dtype: of the result, and of the base while it was trained.
        kept: what the names of weights hold that stay float32.
        quantised: names of the weights that were held in 4 bits.
        used: filled with the names that were merged.
    """

    config: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, torch.Tensor]
    dtype: torch.dtype
    kept: re.Pattern[str] | None
    quantised: frozenset[str]
    used: set[str] = field(default_factory=set)

    @property
    def classifies(self) -> bool:
        """Whether a classifier takes the place of the vocabulary."""
        return bool(self.config.get("task_type") == CLASSIFIES)

    @property
    def classifier(self) -> dict[str, torch.Tensor]:
        """The classifier's weights, which no base has; empty for a causal LM."""
        prefix = f"{CLASSIFIER}."
        return {
            name: tensor.to(self.dtype).contiguous()
            for name, tensor in self.whole.items()
            if self.classifies and name.startswith(prefix)
        }

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged form of a base weight."""
        if name in self.whole:
            self.used.add(name)
            return self.whole[name].to(self.dtype).contiguous()
        if weight.is_floating_point():
            is_kept = self.kept is not None and self.kept.search(name)
            weight = weight.to(torch.float32 if is_kept else self.dtype)
        if name in self.quantised:
            weight = round_trip(weight)
        if name in self.parts:
            self.used.add(name)
            weight = merge_weight(weight, self.parts[name], self.config, name=name.removesuffix(".weight"))
        return weight.contiguous()


def merge_adapter(
    adapter: Path,
    folder: Path,
    settings: ModelSettings,
    *,
    quantised: bool,
    describe: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write base + adapter as a whole model into `folder`.

    Args:
        settings: the model section that was trained with; its path is the base's folder.
        describe: writes a card into the folder.

    Raises:
        UserInputError: the base has no safetensors files, or the adapter names weights that it lacks.
        TrainingFailed: the merged model is another one; nothing is written.
        MissingEnvironmentError: the disk is full; or bitsandbytes is missing for a 4-bit base.
    """
    base, dtype = Path(settings.path), torch_dtype(settings)
    spans = read_spans(base, BASE_FILES)
    check_weight_files(adapter)
    weights = {name.removeprefix(PREFIX): t for name, t in load_file(adapter / ADAPTER_WEIGHTS).items()}
    skeleton = skeleton_of(settings)
    merge = Merge(
        config=adapter_values(adapter),
        parts=_parts(weights),
        whole=_whole(weights, skeleton, spans),
        dtype=dtype,
        kept=kept_pattern(skeleton) if dtype == torch.bfloat16 else None,
        quantised=linear_weights(skeleton) if quantised else frozenset(),
    )
    kind = AutoModelForSequenceClassification if merge.classifies else AutoModelForCausalLM
    num_bytes = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    wanted = logits_with_adapter(adapter, settings, kind, quantised=quantised, num_bytes=num_bytes)
    with model_folder(folder) as temporary:
        if has_same_names(merge, skeleton, spans.keys()):
            write_shards(shards_of(_merged(spans, merge), SHARD_BYTES), temporary)
            _write_configuration(settings, adapter, temporary, merge)
        else:
            config_keys = _classifier_keys(settings, adapter) if merge.classifies else {}
            fold_model(adapter, temporary, settings, kind, quantised=merge.quantised, config_keys=config_keys)
        _copy_the_rest(base, adapter, temporary)
        if settings.trust_remote_code:
            copy_code(base, temporary)
        describe(temporary)
        if wanted is not None:
            check_logits(temporary, settings, kind, wanted)


def skeleton_of(settings: ModelSettings) -> PreTrainedModel:
    """The base as a causal LM without weights."""
    trust = settings.trust_remote_code
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(settings.path, trust_remote_code=trust), trust_remote_code=trust
        )
    return model


def has_same_names(merge: Merge, skeleton: PreTrainedModel, held: Set[str]) -> bool:
    """Whether each weight that the adapter changes has one name and one shape in model and files."""
    linear = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    plain = all(not merge.config.get(key) for key in ODD_KEYS)
    changed = merge.parts.keys() & linear
    wanted = merge.parts.keys() | (merge.whole.keys() - merge.classifier.keys()) | merge.quantised
    return plain and changed == merge.parts.keys() and wanted <= held


def _merged(spans: Mapping[str, Span], merge: Merge) -> Iterator[Named]:
    """All weights of the merged model."""
    for name, span in spans.items():
        if not (merge.classifies and name.startswith("lm_head.")):
            yield name, merge.apply(name, span.tensor())
    yield from merge.classifier.items()
    left = sorted((merge.parts.keys() | merge.whole.keys()) - merge.used - merge.classifier.keys())
    assert not left, left


def linear_weights(skeleton: PreTrainedModel) -> frozenset[str]:
    """Names of the weights that QLoRA holds in 4 bits: transformers' own choice."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    skipped = [*get_keys_to_not_convert(skeleton), *(skeleton._keep_in_fp32_modules or ())]
    copied = copy.deepcopy(skeleton)
    settings = quantisation_settings(torch.bfloat16)
    replace_with_bnb_linear(copied, modules_to_not_convert=skipped, quantization_config=settings)
    return frozenset(
        f"{name}.weight" for name, module in copied.named_modules() if type(module).__name__ == "Linear4bit"
    )


def _parts(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{"model.layers.0.mlp.up_proj.weight": {"lora_A": ..., "lora_B": ...}} from a peft file's weights."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if is_update(name):
            module, _, part = name.removesuffix(".weight").rpartition(".")
            parts.setdefault(f"{module}.weight", {})[part] = tensor
    return parts


def _whole(
    weights: dict[str, torch.Tensor], skeleton: PreTrainedModel, held: Container[str]
) -> dict[str, torch.Tensor]:
    """Weights that take the base's place; of a tied pair the one that the base's files hold."""
    whole = {name: tensor for name, tensor in weights.items() if not is_update(name)}
    if not skeleton.config.get_text_config().tie_word_embeddings:
        return whole
    tied = {name for name in whole if not name.startswith(f"{CLASSIFIER}.")}
    return {name: tensor for name, tensor in whole.items() if name in held or name not in tied}


def _write_configuration(settings: ModelSettings, adapter: Path, folder: Path, merge: Merge) -> None:
    """The base's configuration in the new dtype."""
    config = read_json(Path(settings.path) / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(merge.dtype).removeprefix("torch.")
    for name in merge.whole.keys() - merge.classifier.keys():  # the embedding, with rows for added tokens
        config.get("text_config", config)["vocab_size"] = merge.whole[name].shape[0]
    if merge.classifies:
        config |= _classifier_keys(settings, adapter)
    write_json(folder / "config.json", config)


def _copy_the_rest(base: Path, adapter: Path, folder: Path) -> None:
    """The adapter's tokenizer, and what ends a text: the adapter's knows what ends a turn of its chats."""
    copy_files(base, folder, GENERATION_CONFIG, *TERMS)
    copy_files(adapter, folder, GENERATION_CONFIG, *TOKENIZERS, MATCHING_FILE)


def _classifier_keys(settings: ModelSettings, adapter: Path) -> dict[str, Any]:
    """What makes a base's config.json a classifier's; rows are padded with the tokenizer's pad token."""
    trust = settings.trust_remote_code
    config = AutoConfig.from_pretrained(settings.path, trust_remote_code=trust)
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    words = read_json(adapter / "matching.json")["matching"]["labels"]["en"]
    pad = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust).pad_token_id
    return {
        "architectures": [kind.__name__],
        "id2label": {str(number): word for number, word in enumerate(words)},
        "label2id": {word: number for number, word in enumerate(words)},
        "pad_token_id": pad,
    }
