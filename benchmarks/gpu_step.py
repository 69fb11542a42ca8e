"""Whole training steps on one GPU: tokens/s, MFU, peak memory beside the plan's, ZeRO stages, and the levers.

A model of a known shape gets random bfloat16 weights, our head and attention, and is trained on packs of T
tokens whose documents have real lengths. With DeepSpeed installed the step is the product's own `Engine`;
without it a plain loop with torch's fused AdamW on the bfloat16 weights (`engine: plain`), which keeps no
float32 masters: the two are never compared.
MFU = FLOPs of the weights, of the trained positions' head and of the pairs that documents really have
(`sftcore.model.cost`), over 989 TFLOP/s (H100 and H200, dense bfloat16) and over the rate measured here.
Levers are differences from the plain loop's step, each alone, then all; what they patch is put back.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import util
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from benchmarks.gpu_clock import Case, Target, seconds_of
from benchmarks.gpu_kernels import product_rate
from benchmarks.gpu_unpatched import patched_modules, restored
from sftcore.batching.collate import UNTRAINED, Batch, collate
from sftcore.config import Recipe
from sftcore.data.prompts import Sample
from sftcore.model.adapters import add_adapter
from sftcore.model.attention import choose_attention
from sftcore.model.cost import measure_recipe
from sftcore.model.loss import choose_head
from sftcore.model.ours import checkpoint_activations, install_head, slim_layers
from sftcore.objectives.next_token import NextToken
from sftcore.train.devices import device_here
from sftcore.train.memory import predict_bytes

SLIM = "slim layers"
NOMINAL_TERAFLOPS = 989.0  # per second, dense bfloat16 of an H100 or H200
LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
)
QWEN3_1B7 = Qwen3Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
)
GEMMA3_1B = Gemma3TextConfig(
    vocab_size=262_144,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    sliding_window=512,
)
SHAPES = {
    "llama-3.2-1b": LLAMA_1B,
    "qwen3-1.7b": QWEN3_1B7,
    "gemma-3-1b": GEMMA3_1B,
    "llama-3.1-8b": LLAMA_8B,
}
TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One training step's settings.

    Args:
        shape: a name in SHAPES, or "tiny".
        adapter: none or lora.
        num_tokens: T, of the one pack a step.
        trained_share: of the tokens.
        checkpointing: none or full activation checkpointing.
        optimizer: adamw or adamw-8bit.
        deepspeed: a configuration's name, or "plain" for the loop without DeepSpeed.
        levers: names in LEVERS; the product's own unless said otherwise.
    """

    shape: str
    adapter: str = "none"
    num_tokens: int = 4096
    trained_share: float = 0.6
    checkpointing: str = "none"
    optimizer: str = "adamw"
    deepspeed: str = "zero1"
    levers: tuple[str, ...] = (SLIM,)

    def describe(self, section: str) -> dict:
        """The row's first columns."""
        names = ("shape", "adapter", "num_tokens", "checkpointing", "optimizer", "deepspeed")
        columns = {name: getattr(self, name) for name in names}
        return {"section": section, **columns, "levers": [*self.levers]}


def step_cases(target: Target) -> Iterator[Case]:
    """Shapes x full and LoRA x pack sizes, then ZeRO-2 of the smallest."""
    smallest = _smallest(target)
    if target.is_tiny:
        chosen = [smallest, replace(smallest, adapter="lora"), replace(smallest, checkpointing="full")]
    else:
        large = replace(smallest, shape="llama-3.1-8b")
        chosen = [
            smallest,
            replace(large, adapter="lora"),
            *(replace(smallest, shape=shape) for shape in ("qwen3-1.7b", "gemma-3-1b")),
            replace(large, optimizer="adamw-8bit", checkpointing="full"),
            replace(smallest, num_tokens=16_384),
            replace(large, adapter="lora", num_tokens=16_384, checkpointing="full"),
        ]
    if smallest.deepspeed != "plain":
        chosen.append(replace(smallest, deepspeed="zero2"))
    return (_step_case(target, settings) for settings in chosen)


def zero3_cases(target: Target) -> Iterator[Case]:
    """ZeRO-3 of the smallest shape, where DeepSpeed is installed."""
    smallest = _smallest(target)
    if smallest.deepspeed != "plain":
        yield _step_case(target, replace(smallest, deepspeed="zero3"))


def _smallest(target: Target) -> Settings:
    engine = "zero1" if util.find_spec("deepspeed") else "plain"
    if target.is_tiny:
        return Settings(shape="tiny", num_tokens=512, deepspeed=engine)
    return Settings(shape="llama-3.2-1b", deepspeed=engine)


def _step_case(target: Target, settings: Settings) -> Case:
    return Case(
        description=settings.describe("step"),
        run=lambda: measure_step(target, settings),
        seconds=26 if "8b" in settings.shape else 12,
    )


def lever_cases(target: Target) -> Iterator[Case]:
    """Each lever alone on the plain loop, then all of them."""
    base = replace(_smallest(target), deepspeed="plain")
    for levers in ((), *((name,) for name in LEVERS), tuple(LEVERS)):
        settings = replace(base, levers=levers)
        yield Case(
            description=settings.describe("lever"),
            run=lambda s=settings: measure_step(target, s),
            seconds=35 if "compiled blocks" in levers else 8,
        )


def measure_step(target: Target, settings: Settings) -> dict:
    """Tokens/s, MFU, peak bytes and the plan's prediction of them, seconds by part."""
    torch.manual_seed(0)
    config = config_of(settings)
    with tempfile.TemporaryDirectory() as folder, restored(patched_modules(config)):
        config.save_pretrained(folder)
        recipe = make_recipe(settings, folder)
        cost = measure_recipe(recipe)
        predicted = predict_bytes(
            recipe, world=1, num_tokens=settings.num_tokens, device=device_here(), cost=cost
        )
        target.reset_peak()
        model = build(target, config, recipe, is_slim=SLIM in settings.levers)
        batches = [make_batch(target, config, settings, seed) for seed in range(4)]
        make_step = plain_step if settings.deepspeed == "plain" else engine_step
        step, close = make_step(model, recipe, settings)
        try:
            turn = iter(range(10**6))
            seconds = seconds_of(target, lambda: step(batches[next(turn) % len(batches)]), warmup=3)
        finally:
            close()
    lengths = np.array(batches[0].document_lengths)
    trained = np.full(len(lengths), len(batches[0].targets) / len(lengths))
    rate = 1e-12 * float(cost.coefficients.of(lengths, trained).sum()) / seconds
    return {
        "seconds": seconds,
        "tokens_per_second": settings.num_tokens / seconds,
        "documents": len(lengths),
        "trained_tokens": len(batches[0].targets),
        "mfu_of_989": rate / NOMINAL_TERAFLOPS,
        "mfu_of_measured": rate / product_rate(target, 256 if target.is_tiny else 8192),
        "peak_bytes": target.peak_bytes(),
        "predicted_bytes": sum(predicted.values()),
    }


def config_of(settings: Settings) -> Any:
    """The configuration of the settings' shape."""
    return TINY if settings.shape == "tiny" else SHAPES[settings.shape]


def make_recipe(settings: Settings, folder: str) -> Recipe:
    """What a user would write for these settings."""
    return Recipe.model_validate(
        {
            "model": {"path": folder},
            "data": {"train": [{"format": "jsonl", "path": "unused"}]},
            "adapter": {"kind": settings.adapter, "r": 16},
            "batch": {"samples_per_step": 64, "capacity": settings.num_tokens},
            "train": {"optimizer": settings.optimizer, "activation_checkpointing": settings.checkpointing},
            "deepspeed": "zero1" if settings.deepspeed == "plain" else settings.deepspeed,
        }
    )


def build(target: Target, config: Any, recipe: Recipe, *, is_slim: bool) -> NextToken:
    """Random weights, made on the device."""
    device = target.device.type
    attention = choose_attention(config, recipe.model.attention, dtype="bfloat16", device=device)
    with target.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    model.config.use_cache = False
    if is_slim:
        slim_layers(model)
    install_head(model, z_loss=0.0, label_smoothing=0.0, kind=choose_head("auto", device=device))
    if recipe.adapter.kind != "none":
        add_adapter(model, recipe.adapter, seed=0)
    if recipe.train.activation_checkpointing == "full":
        checkpoint_activations(model)
    return NextToken(model.train())


def make_batch(target: Target, config: Any, settings: Settings, seed: int) -> Batch:
    """A pack of exactly T tokens of random ids; of each document the last share is trained."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in target.documents(settings.num_tokens, seed=seed):
        ids = rng.integers(3, config.vocab_size, length).astype(np.int32)
        labels = np.append(ids[1:], UNTRAINED).astype(np.int32)  # shifted: each position's next token
        labels[: length - max(1, int(settings.trained_share * length))] = UNTRAINED
        count = int((labels != UNTRAINED).sum())
        samples.append(Sample(id=str(len(samples)), input_ids=ids, labels=labels, num_trained=count))
    trained = sum(sample.num_trained for sample in samples)
    return collate(
        samples, normalise="token", num_trained_in_step=trained, num_samples_in_step=len(samples)
    ).to(target.device)


Step = tuple[Callable[[Batch], object], Callable[[], None]]


def engine_step(model: NextToken, recipe: Recipe, settings: Settings) -> Step:
    """The product's own step, and how to end it."""
    from sftcore.recipe import deepspeed_file
    from sftcore.train.ds_config import read_ds_config
    from sftcore.train.engine import Engine, init_process_group

    if not torch.distributed.is_initialized():
        init_process_group()
    engine = Engine(model, recipe, read_ds_config(deepspeed_file(recipe)))
    return lambda batch: engine.step([batch], seeds=[0], rates={"lr": 1e-5}), engine.close


def plain_step(model: NextToken, recipe: Recipe, settings: Settings) -> Step:
    """Forward, backward, clipping and AdamW in plain torch, with the settings' levers."""
    for name in settings.levers:
        LEVERS[name](model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused="fused optimizer" in settings.levers or None)

    def step(batch: Batch) -> None:
        model(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def _fuse_layers(model: NextToken) -> None:
    """Liger's norms, rotary embedding and SwiGLU; the loss stays ours. Also patches the model's module."""
    liger = importlib.import_module("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance(
        model.causal_lm, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _compile_blocks(model: NextToken) -> None:
    """Each decoder layer by itself; packs have a fixed number of tokens here, as buckets would give.

    A rehearsal on a CPU traces the layers and leaves inductor out: what it builds there (torch 2.13, g++ 12)
    damaged the heap on an EPYC of December 2026, and no number of a rehearsal counts.
    """
    for layer in model.causal_lm.get_decoder().layers:
        layer.compile(backend="inductor" if model.causal_lm.device.type == "cuda" else "aot_eager")


def _read_elsewhere(model: NextToken) -> None:
    """Slim layers are made by `build`, the fused optimizer by `plain_step`."""


def _checkpoint(model: NextToken) -> None:
    """All layers' activations computed again in backward."""
    checkpoint_activations(model.causal_lm)


LEVERS: dict[str, Callable[[NextToken], None]] = {
    SLIM: _read_elsewhere,
    "fused optimizer": _read_elsewhere,
    "fused layers": _fuse_layers,
    "compiled blocks": _compile_blocks,
    "activation checkpointing": _checkpoint,
}
