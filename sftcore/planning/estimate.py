"""How long runs will take on this machine, before the first of them: counted work, measured speed.

In: recipes of runs to do, the folder that they share. Out: seconds.
Invariant: what runs share (memory levels, the base model's answers) counts once, and not if it is there.
Trade-off: tokens are counted from 64 records and a model's size, and constants stand for all that is not a
matrix product: of undisturbed runs a probe took 1.0 times as long as it says, 60 or 300 pairs with
Gemma-3-270M 1.0, 60 or 240 facts with SmolLM2-135M 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean

import torch

from sftcore.config import Recipe
from sftcore.data.ledger import Ledger
from sftcore.data.prompts import Prompter, PromptOptions, Sample
from sftcore.data.splits import load_records
from sftcore.knowledge.level_files import holds_levels
from sftcore.model.cost import measure_recipe
from sftcore.precision import dtype_of, matmul_rate
from sftcore.recipe import source_files
from sftcore.stages.prepare import recipe_tokenizer
from sftcore.stages.whole_run import shared_name
from sftcore.tasks import TASKS
from sftcore.train.devices import Device

LOOKED_AT = 64  # records whose tokens are counted
TRAINED_AT, DECODED_AT = 0.3, 0.35  # of the rate of a lone product: packs, and rows of one token
UPDATE_BYTES_PER_WEIGHT, MEMORY_BYTES_PER_SECOND = 18, 10e9  # of Adam with float32 masters, on two cores
PROCESS_SECONDS = 60  # imports, reading and writing the model
PROBE_PROMPT_TOKENS, NAME_TOKENS = 15, 4
FORMS_PER_PROMPT = 4  # of 60 shipped facts, whose names and articles are scored
GPU_DECODED_AT = 0.2  # of a GPU's peak, an assumption (docs/memory-levels.md)
GPU_FORWARD_SECONDS = 0.02  # of a forward at least, whose kernels are started one by one: an assumption, too
MAX_SOURCE_BYTES = 100e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the work of a recipe follows from.

    Args:
        records: of each split.
        sample_tokens: prompt and answer, on average.
        body, head: weights after each token, and after each predicted one.
    """

    records: dict[str, int]
    sample_tokens: float
    body: int
    head: int


def estimate_seconds(recipes: Sequence[Recipe], shared: Path) -> list[float] | None:
    """Seconds that each of the runs will take, one after another, on CPUs.

    Returns:
        None where reading the data would take long itself, or there is a GPU: the constants are not of one.
    """
    if torch.cuda.is_available() or any(_source_bytes(recipe) > MAX_SOURCE_BYTES for recipe in recipes):
        return None
    found, done = [], {folder.name for folder in shared.glob("*") if _is_whole(folder)}
    rates = {name: matmul_rate(name) for name in {dtype_of(recipe.model) for recipe in recipes}}
    for recipe in recipes:
        sizes = _sizes(recipe.model_dump_json(include={"data", "model", "task", "matching", "batch"}))
        rate = rates[dtype_of(recipe.model)]
        once = {shared_name("base", recipe): _answers(recipe, sizes, rate)}
        if recipe.evaluate.few_shot and not recipe.classifies:
            shots = 1 + recipe.evaluate.few_shot
            once[shared_name("fewshot", recipe)] = _answers(recipe, sizes, rate, shots=shots)
        if recipe.selects_by_level:
            once[shared_name("levels", recipe)] = _probing(recipe, sizes, rate)
        own = PROCESS_SECONDS + _training(recipe, sizes, rate) + _answers(recipe, sizes, rate) / 2
        found.append(own + sum(seconds for name, seconds in once.items() if name not in done))
        done |= once.keys()
    return found


def _is_whole(folder: Path) -> bool:
    """Whether what runs share is there; a probe's folder is there before its levels are."""
    return not folder.name.startswith("levels") or holds_levels(folder)


def _source_bytes(recipe: Recipe) -> int:
    data = recipe.data
    files = (file for source in (*data.train, *data.test, *data.ood) for file in source_files(source))
    return sum(file.stat().st_size for file in files if file.is_file())


@lru_cache(maxsize=64)
def _sizes(sections: str) -> Sizes:
    recipe = Recipe.model_validate_json(sections)
    found = {split: load_records(recipe, split, Ledger()) for split in ("train", "test", "ood")}
    some = found["train"][:: max(1, len(found["train"]) // LOOKED_AT)]
    drafts = Prompter(PromptOptions.of(recipe), recipe_tokenizer(recipe)).sample_batch(some)
    lengths = [len(draft.input_ids) for draft in drafts if isinstance(draft, Sample)]
    cost = measure_recipe(recipe)
    return Sizes(
        records={split: len(records) for split, records in found.items()},
        sample_tokens=mean(lengths),
        body=cost.num_active_parameters,
        head=cost.hidden_size * cost.vocabulary,
    )


def _training(recipe: Recipe, sizes: Sizes, rate: float) -> float:
    chosen = recipe.select.n if recipe.select else "all"
    samples = (sizes.records["train"] if chosen == "all" else chosen) * recipe.train.epochs
    tokens = samples * sizes.sample_tokens
    per_step = recipe.batch.samples_per_step
    steps = samples / per_step if per_step else tokens / (recipe.batch.tokens_per_step or tokens)
    update = UPDATE_BYTES_PER_WEIGHT * (sizes.body + sizes.head) / MEMORY_BYTES_PER_SECOND
    if recipe.adapter.kind != "none":
        update = 0.0
    return 6 * sizes.body * tokens / (TRAINED_AT * rate) + steps * update


def _answers(recipe: Recipe, sizes: Sizes, rate: float, *, shots: int = 1) -> float:
    """One model's answers to all held-out items; a tuned one's are half as long."""
    items = sizes.records["test"] + sizes.records["ood"]
    is_generated = TASKS[recipe.task].answered_by(recipe.matching) == "generation"
    decoded = recipe.evaluate.max_new_tokens if is_generated else 0
    read = 2 * sizes.body * sizes.sample_tokens * shots / TRAINED_AT
    return items * (read + 2 * (sizes.body + sizes.head) * decoded / DECODED_AT) / rate


def _probing(recipe: Recipe, sizes: Sizes, rate: float) -> float:
    prompts = sum(sizes.records.values()) * recipe.probe.templates
    return prompts * _flops_of_prompt(recipe, sizes.body, sizes.head) / rate


def _flops_of_prompt(recipe: Recipe, body: int, head: int) -> float:
    """Of one wording of a fact, at the rate of a lone product: completions, or likelihoods of names."""
    if recipe.probe.estimator == "likelihood":
        return FORMS_PER_PROMPT * 2 * (body * PROBE_PROMPT_TOKENS + head * NAME_TOKENS) / TRAINED_AT
    decoded = recipe.probe.samples * recipe.probe.max_new_tokens
    return 2 * body * PROBE_PROMPT_TOKENS / TRAINED_AT + 2 * (body + head) * decoded / DECODED_AT


def probe_seconds(recipe: Recipe, num_prompts: int, device: Device) -> float | None:
    """Seconds that a probe of so many prompts takes: on this machine's CPU, or on a GPU of known rate."""
    cost = measure_recipe(recipe)
    flops = num_prompts * _flops_of_prompt(
        recipe, cost.num_body_parameters, cost.hidden_size * cost.vocabulary
    )
    if not device.is_gpu:
        return flops / matmul_rate(dtype_of(recipe.model))
    if device.peak_flops is None:
        return None
    is_drawn = recipe.probe.estimator == "sampling"
    rows = num_prompts * (recipe.probe.samples if is_drawn else FORMS_PER_PROMPT)
    forwards = rows / recipe.probe.batch_rows * (recipe.probe.max_new_tokens if is_drawn else 1)
    return max(flops * DECODED_AT / (GPU_DECODED_AT * device.peak_flops), forwards * GPU_FORWARD_SECONDS)
