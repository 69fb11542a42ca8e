"""Fit: a recipe and where it is to run -> shipped DeepSpeed configurations that fit, the best, or what would.

In: a recipe and a `Place`. Out: a `Choice` for each configuration; the name of the best; settings that fit.
Invariant: fits means predicted bytes within what the device lets a rank fill; all from `predict_bytes`.
Trade-off: fastest first is an order by communication (benchmarks.gpu measures it on GPUs), no prediction of
seconds: where two configurations fit, the earlier is named even if the later would be as fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sftcore.amounts import size
from sftcore.config import Recipe
from sftcore.errors import SftError
from sftcore.model.cost import ModelCost, measure_recipe
from sftcore.recipe import DS_CONFIGS, deepspeed_file
from sftcore.train.compatibility import check_combination
from sftcore.train.devices import Device
from sftcore.train.ds_config import read_ds_config
from sftcore.train.memory import lighter_recipes, predict_bytes, predict_host_bytes

# Communication per step, then what crosses to the host: ds_configs/README.md
FASTEST_FIRST = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "zero3-nvme")
ON_REQUEST = ("zeropp",)  # pays over slow networks only, and rounds weights and gradients
MAX_GROWTH = 64  # times as many ranks are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a recipe is to run, and the most it has to hold there.

    Args:
        num_tokens: of the largest pack.
        longest: tokens of the longest sample, below which no capacity can go.
        has_async_io: whether offload to NVMe works there.
    """

    device: Device
    world: int
    num_tokens: int
    longest: int
    has_async_io: bool = False


Change = tuple[str, Recipe, Place]  # what changes; the recipe and the place then


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A DeepSpeed configuration for a recipe.

    Args:
        device_bytes: predicted peak of a rank.
        host_bytes: what a rank keeps in host memory, or on NVMe, instead.
        refusal: why it can't be trained, however much memory there is; empty if it can.
    """

    name: str
    device_bytes: int
    host_bytes: int
    fits: bool
    refusal: str


def list_choices(recipe: Recipe, place: Place, cost: ModelCost | None = None) -> list[Choice]:
    """The recipe under its own configuration, if that is not shipped, and under each shipped one."""
    cost = cost or measure_recipe(recipe)
    shipped = [*FASTEST_FIRST, *ON_REQUEST]
    own = [] if configuration_name(recipe) in shipped else [configuration_name(recipe)]
    return [_judge(recipe.model_copy(update={"deepspeed": name}), place, cost) for name in [*own, *shipped]]


def configuration_name(recipe: Recipe) -> str:
    """The name of a shipped configuration, or the path of another."""
    file = deepspeed_file(recipe)
    return file.stem if file.parent == DS_CONFIGS else str(file)


def best_choice(choices: list[Choice]) -> Choice | None:
    """The fastest of those that fit; None if none does."""
    able = {choice.name: choice for choice in choices if choice.fits and not choice.refusal}
    return next((able[name] for name in FASTEST_FIRST if name in able), None)


def _judge(recipe: Recipe, place: Place, cost: ModelCost) -> Choice:
    needed = predict_bytes(
        recipe, world=place.world, num_tokens=place.num_tokens, device=place.device, cost=cost
    )
    refusal = ""
    try:
        check_combination(
            read_ds_config(deepspeed_file(recipe)),
            recipe.train.optimizer,
            has_cuda=place.device.is_gpu,
            has_async_io=place.has_async_io,
        )
    except SftError as error:
        refusal = "; ".join(problem.what for problem in error.problems)
    return Choice(
        name=configuration_name(recipe),
        device_bytes=sum(needed.values()),
        host_bytes=predict_host_bytes(recipe, world=place.world, device=place.device, cost=cost),
        fits=sum(needed.values()) <= place.device.usable_bytes(place.world),
        refusal=refusal,
    )


def what_would_fit(recipe: Recipe, place: Place, *, with_offload: bool) -> list[str]:
    """Changes after which some configuration fits, each with it and its bytes; empty if none was found.

    Looked at: a smaller capacity, recomputation, 8-bit optimizer states, LoRA, QLoRA, more ranks, each alone;
    then recomputation with LoRA or QLoRA.

    Args:
        with_offload: whether fitting by offload counts; states are on the host then, ranks don't matter.
    """
    costs: dict[str, ModelCost] = {}  # LoRA's and QLoRA's are the same; a 7B one takes 3 s

    def first_fitting(changes: Iterable[Change]) -> str:
        for name, changed, at in changes:
            kind = "full" if changed.adapter.kind == "none" else "adapter"
            costs[kind] = costs.get(kind) or measure_recipe(changed)
            choices = list_choices(changed, at, costs[kind])
            best = best_choice([choice for choice in choices if with_offload or not choice.host_bytes])
            if best is not None:
                return f"{name} ({best.name}: {size(best.device_bytes)})"
        return ""

    lighter = lighter_recipes(recipe, longest=place.longest)
    rest = [[(name, changed, place)] for name, changed in lighter if not name.startswith("batch")]
    ladders = [_smaller_packs(recipe, place), *rest, _more_ranks(recipe, place)]
    if alone := [text for ladder in ladders if (text := first_fitting(ladder))]:
        return alone
    recomputed = dict(lighter).get("train.activation_checkpointing: full", recipe)
    both = [
        (f"{name} with train.activation_checkpointing: full", changed, place)
        for name, changed in lighter_recipes(recomputed, longest=place.longest)
        if name.startswith("adapter")
    ]
    return [text for change in both if (text := first_fitting([change]))]


def _smaller_packs(recipe: Recipe, place: Place) -> Iterator[Change]:
    """Half the capacity, a quarter, ... down to the longest sample."""
    capacity, total = recipe.batch.capacity, recipe.batch.tokens_per_step or 0
    while capacity > place.longest:
        capacity = max(place.longest, capacity // 2)
        batch = recipe.batch.model_copy(update={"capacity": capacity})
        smaller = replace(place, num_tokens=min(place.num_tokens, capacity))
        if total % capacity == 0:
            yield f"batch.capacity: {capacity}", recipe.model_copy(update={"batch": batch}), smaller


def _more_ranks(recipe: Recipe, place: Place) -> Iterator[Change]:
    """Twice as many, four times, ... where each brings its own memory."""
    world = place.world
    while place.device.is_gpu and world < MAX_GROWTH * place.world:
        world *= 2
        yield f"{world} ranks", recipe, replace(place, world=world)
