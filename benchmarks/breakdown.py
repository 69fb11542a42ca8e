"""Where a training step's time goes: MODEL ITEMS SAMPLES_PER_STEP STEPS DTYPE -> one line of JSON.

    python -m benchmarks.breakdown .cache/models/smollm2-135m ITEMS.jsonl 64 1 bfloat16

One batch, forward and backward without an optimizer, each variant once unmeasured and then
`REPEATS` times in turn; medians.

    ours         packed, projection of trained positions       what sftcore runs
    full head    packed, projection of every position          -> what prompts cost in the head
    padded       a row per sample, transformers' own forward    -> what padding costs (and one mask for all)

The machine's limit is measured between them: products of the decoder's and the head's own shapes at
this number of tokens. What is above `products` in the decoder is attention, norms and everything else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import versions
from sftcore.batching.collate import UNTRAINED, Batch, collate
from sftcore.config import Recipe
from sftcore.data.prepare import prepare_store
from sftcore.data.tokens import load_tokenizer
from sftcore.model.forward import decode_states, output_head
from sftcore.model.loss import TrainedTokenHead
from sftcore.objectives import load_objective
from sftcore.objectives.next_token import NextToken

REPEATS = 3


def main() -> None:
    """Measure and print."""
    model_path, items, per_step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(measure(model_path, items, per_step, dtype=sys.argv[5])))


def measure(model_path: str, items: Path, per_step: int, *, dtype: str) -> dict:
    """Median seconds of each variant, and the machine's limit for the same products."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": model_path, "dtype": dtype},
            "data": {"train": [{"format": "jsonl", "path": str(items)}]},
            "batch": {"samples_per_step": per_step, "capacity": 4096},
        }
    )
    store = prepare_store(recipe, load_tokenizer(model_path), cache_root=items.parent / "stores")
    samples = [store[i] for i in range(per_step)]
    batch = collate(
        samples,
        normalise="token",
        num_trained_in_step=int(store.num_trained[:per_step].sum()),
        num_samples_in_step=per_step,
    )
    model = load_objective(recipe)
    model.train()
    held_in = model.causal_lm.dtype
    variants = {
        "ours": lambda: model(batch)[0].backward(),
        "ours, decoder alone": lambda: decode_states(model.causal_lm, batch).float().mean().backward(),
        "full head": lambda: model(with_full_head(batch))[0].backward(),
        "padded": padded(model, samples),
        "products of the decoder": products(decoder_shapes(model), batch.num_tokens, held_in),
        "products of the head": products([head_shape(model)], len(batch.targets), held_in),
    }
    seconds = timed(variants, model)
    return {
        "samples_per_step": per_step,
        "num_tokens": batch.num_tokens,
        "num_padded_tokens": per_step * max(batch.document_lengths),
        "num_trained_tokens": len(batch.targets),
        "forward_and_backward_seconds": seconds,
        "products_teraflops_per_second": 6e-12
        * sum(a * b for a, b in decoder_shapes(model))
        * batch.num_tokens
        / seconds["products of the decoder"],
        "versions": versions("torch", "transformers"),
    }


def timed(variants: dict[str, Callable[[], None]], model: NextToken) -> dict[str, float]:
    """Medians; the first run of each is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=False)  # as between steps: gradients are added to
    return {name: median(values[1:]) for name, values in seconds.items()}


def with_full_head(batch: Batch) -> Batch:
    """The same batch and loss, with every position before the head."""
    targets = torch.zeros(batch.num_tokens, dtype=torch.int64)
    weights = torch.zeros(batch.num_tokens)
    targets[batch.trained_index], weights[batch.trained_index] = batch.targets, batch.weights
    index = torch.arange(batch.num_tokens)
    return replace(batch, trained_index=index, targets=targets, weights=weights)


def padded(model: NextToken, samples: list) -> Callable[[], None]:
    """transformers' plain forward of rows padded to the longest, with the loss of all positions' logits."""
    width = max(len(s.input_ids) for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    labels = torch.full_like(ids, UNTRAINED)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[row, :n] = torch.from_numpy(sample.input_ids.astype("int64"))
        labels[row, :n] = torch.from_numpy(sample.labels.astype("int64"))
        mask[row, :n] = 1

    def run() -> None:
        used = model.causal_lm.config._attn_implementation
        model.causal_lm.set_attn_implementation("sdpa")
        logits = model.causal_lm(input_ids=ids, attention_mask=mask).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
        model.causal_lm.set_attn_implementation(used)

    return run


def decoder_shapes(model: NextToken) -> list[tuple[int, int]]:
    """(out, in) of each linear layer but the head."""
    return [
        tuple(m.weight.shape)
        for m in model.causal_lm.modules()
        if isinstance(m, torch.nn.Linear) and not isinstance(m, TrainedTokenHead)
    ]


def head_shape(model: NextToken) -> tuple[int, int]:
    """(V, D)."""
    return tuple(output_head(model.causal_lm).weight.shape)


def products(shapes: list[tuple[int, int]], num_rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The three products of each linear layer's forward and backward, and nothing else."""
    operands = {
        shape: (torch.randn(shape, dtype=dtype), torch.randn(num_rows, shape[1], dtype=dtype))
        for shape in set(shapes)
    }

    def run() -> None:
        for shape in shapes:
            weight, x = operands[shape]
            y = x @ weight.T
            y @ weight
            y.T @ x

    return run


if __name__ == "__main__":
    main()
