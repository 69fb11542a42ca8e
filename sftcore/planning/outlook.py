"""What a plan comes to on a device: will it train, end its answers, fit, and how many hours.

In: a recipe, its store and plan, a `Device`. Out: a dictionary next to the plan's; its lines for a terminal.
Invariant: judged by training's own checks, so a recipe that "trains" here is not refused there by them.
Trade-off: packages (flash-attn, bitsandbytes, libaio) are looked for in this environment, which a cluster's
GPU nodes are taken to share; only whether there are GPUs, and how large, comes from the `Device`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from sftcore.amounts import counted, duration, size, work
from sftcore.config import ADAPTER_LR, FULL_LR, Recipe
from sftcore.data.chat import turn_ends
from sftcore.data.store import TokenStore
from sftcore.data.tokens import Tokenizer, codec_of
from sftcore.errors import MissingEnvironmentError, Problem, SftError, UserInputError
from sftcore.model.attention import choose_attention
from sftcore.model.cost import measure_recipe
from sftcore.model.demands import check_demands
from sftcore.model.load import load_config
from sftcore.model.loss import choose_head
from sftcore.model.proof import NOT_PACKED, refusing
from sftcore.model.quantise import require_bitsandbytes
from sftcore.model.trial import Way, try_code
from sftcore.objectives import objective_of
from sftcore.planning.preflight import describe_plan
from sftcore.planning.unprobed import awaits_probe, describe_probe, prepare_any_facts, probe_note
from sftcore.precision import dtype_of
from sftcore.recipe import deepspeed_file
from sftcore.stages.held_out import check_scorable
from sftcore.stages.prepare import prepare
from sftcore.train.devices import Device, device_here
from sftcore.train.ds_config import read_ds_config
from sftcore.train.engine import check_engine, may_have_async_io
from sftcore.train.fit import Place, best_choice, configuration_name, list_choices, what_would_fit
from sftcore.train.foreseen import check_layers
from sftcore.train.plan import make_schedule
from sftcore.train.tracking import check_tracker

Row = dict[str, Any]
MAX_FULL_LR = 5e-5  # full fine-tuning takes 1e-6 to 5e-5, LoRA about ten times as much (arXiv 2405.09673)


def plan(recipe: Recipe, *, world: int = 1, device: Device | None = None, mfu: float = 0.4) -> Row:
    """Steps, packs, predicted memory and hours, and under "outlook" what fits and what won't train.

    Args:
        world: number of ranks.
        device: of each rank (`sftcore.train.devices.choose_device`); None: as this machine's.
        mfu: the share of its peak that training will reach.

    Raises:
        UserInputError, MissingEnvironmentError: as `look_ahead`.
    """
    described, outlook, _ = look_ahead(recipe, world=world, device=device or device_here(), mfu=mfu)
    return {**described, "outlook": outlook}


def look_ahead(recipe: Recipe, *, world: int, device: Device, mfu: float) -> tuple[Row, Row, SftError | None]:
    """The plan of a recipe, its outlook on `device`, and what training there would refuse.

    Args:
        mfu: the share of the device's peak that training will reach.

    Raises:
        UserInputError, MissingEnvironmentError: there is nothing to plan (no data, tokenizer, config), or
            nothing of the held-out data could be scored.
    """
    check_scorable(recipe)
    is_early = awaits_probe(recipe)
    tokenizer, store = prepare_any_facts(recipe) if is_early else prepare(recipe)
    refusal = why_not_trainable(recipe, device)
    try:
        cost = measure_recipe(recipe).coefficients
    except SftError as error:  # what can't be trained need not be countable: the reason is why it can't
        raise refusal or error from error
    schedule = make_schedule(recipe, store, world=world, cost=cost)
    plan = describe_plan(recipe, store, schedule, device)
    stop = describe_stop(recipe, store, tokenizer)
    outlook = describe_outlook(recipe, plan, device=device, mfu=mfu, stop=stop, refusal=refusal)
    probe = describe_probe(recipe, device) if is_early else None
    outlook |= {"probe": probe, "notes": notes_on(recipe, plan, probe)}
    return plan, outlook, refusal


def notes_on(recipe: Recipe, plan: Row, probe: Row | None) -> list[str]:
    """What a reader of the plan should know before training: a probe to come, an odd rate, a single step."""
    notes = [] if probe is None else [probe_note(recipe, probe)]
    rate, is_adapter = recipe.train.peak_lr, recipe.adapter.kind != "none"
    if is_adapter and rate <= MAX_FULL_LR:
        notes.append(
            f"train.lr {rate:g} is a rate for all weights: an adapter hardly learns at it"
            f" (train.lr: auto is {ADAPTER_LR:g} with one)"
        )
    if not is_adapter and rate >= ADAPTER_LR:
        notes.append(
            f"train.lr {rate:g} is a rate for adapters: all weights may come apart at it"
            f" (train.lr: auto is {FULL_LR:g} without one)"
        )
    if plan["totals"]["num_steps"] == 1:
        notes.append(
            "1 step in all: the weights are updated once, at the rate of step 1; lower batch.samples_per_step"
            " (or tokens_per_step), or raise train.epochs or the number of samples"
        )
    return notes


def describe_outlook(
    recipe: Recipe, plan: Row, *, device: Device, mfu: float, stop: Row, refusal: SftError | None
) -> Row:
    """What plan.json does not have.

    Args:
        plan: as `describe_plan` gives it.
        mfu: the share of the device's peak that training will reach.
        stop: as `describe_stop` gives it.
        refusal: as `why_not_trainable` gives it.
    """
    totals = plan["totals"]
    place = Place(
        device=device,
        world=plan["world"],
        num_tokens=totals["largest_pack_tokens"],
        longest=totals["longest_sample_tokens"],
        has_async_io=may_have_async_io(),
    )
    choices = list_choices(recipe, place)
    best = best_choice(choices)
    is_poor = best is None or best.host_bytes > 0
    return {
        "device": asdict(device) | {"usable_bytes": device.usable_bytes(place.world)},
        "mfu": mfu,
        "hours": predict_hours(plan, device, mfu),
        "stop_token": stop,
        "compatible": refusal is None,
        "problems": [] if refusal is None else [asdict(problem) for problem in refusal.problems],
        "deepspeed": configuration_name(recipe),
        "ds_configs": [asdict(choice) for choice in choices],
        "best": best.name if best else None,
        "probe": None,
        "notes": [],
        "would_fit": what_would_fit(recipe, place, with_offload=best is None) if is_poor else [],
    }


def why_not_trainable(recipe: Recipe, device: Device) -> SftError | None:
    """What training on `device` would refuse before its first step, all at once; None if nothing."""
    ds_config = read_ds_config(deepspeed_file(recipe))
    kind = "cuda" if device.is_gpu else "cpu"
    model, dtype = recipe.model, dtype_of(recipe.model)
    is_encoder = recipe.architecture == "encoder"
    checks: list[Callable[[], object]] = [
        lambda: check_engine(ds_config, recipe.train.optimizer, has_cuda=device.is_gpu),
        lambda: check_tracker(recipe),
        lambda: choose_head("chunked" if recipe.classifies else model.head, device=kind),
    ]
    config = load_config(model)
    checks.append(lambda: check_demands(recipe, config))
    if not is_encoder:
        checks.append(lambda: _check_packs(recipe, config, dtype=dtype, device=kind))
        checks.append(lambda: check_layers(recipe, ds_config))
    if recipe.adapter.kind == "qlora":
        checks.append(lambda: require_bitsandbytes("adapter.kind: qlora"))
    if recipe.train.optimizer == "adamw-8bit":
        checks.append(lambda: require_bitsandbytes("train.optimizer: adamw-8bit"))
    errors = [error for check in checks if (error := _error_of(check))]
    problems = [problem for error in errors for problem in error.problems]
    if not problems:
        return None
    is_lack = all(isinstance(error, MissingEnvironmentError) for error in errors)
    return MissingEnvironmentError(*problems) if is_lack else UserInputError(*problems)


def _check_packs(recipe: Recipe, config: Any, *, dtype: str, device: str) -> None:
    try_code(config, Way.of(recipe, kind=objective_of(recipe).auto_class))
    with refusing(config.model_type, NOT_PACKED):
        choose_attention(config, recipe.model.attention, dtype=dtype, device=device)


def _error_of(check: Callable[[], object]) -> SftError | None:
    try:
        check()
    except SftError as error:
        return error
    return None


def predict_hours(plan: Row, device: Device, mfu: float) -> float | None:
    """Hours of training: the slowest rank's FLOPs over what its device does; None without a known peak."""
    if device.peak_flops is None:
        return None
    totals = plan["totals"]
    slowest = totals["flops"] * (1 + totals["imbalance"]) / plan["world"]
    return float(slowest / (mfu * device.peak_flops) / 3600)


def describe_stop(recipe: Recipe, store: TokenStore, tokenizer: Tokenizer) -> Row:
    """Whether the samples train the model to end its answers, from the store's own labels.

    Returns:
        trained: yes (every sample), no (none), partly, or "not needed" where classes are predicted; share: of
        samples whose last trained target is a stop token; stop_ids: those that decoding ends at.
    """
    if recipe.classifies:
        return {"trained": "not needed", "share": None, "stop_ids": []}
    configured = load_config(recipe.model).get_text_config().eos_token_id
    others = configured if isinstance(configured, list) else [configured]
    codec, last_ids = codec_of(tokenizer), set[int]()
    if any(source.format == "jsonl" for source in recipe.data.train):
        with contextlib.suppress(UserInputError):  # chats would have been refused: these are completions
            turn_end, last = turn_ends(codec)
            others, last_ids = [*others, turn_end], {last}
    ids = sorted({codec.stop_id, *(i for i in others if i is not None)})
    share = float(np.isin(store.last_targets, [*ids, *last_ids]).mean())
    return {"trained": {0.0: "no", 1.0: "yes"}.get(share, "partly"), "share": share, "stop_ids": ids}


def outlook_table(outlook: Row, plan: Row) -> str:
    """The outlook as lines for a terminal, each derived number with its arithmetic."""
    device, stop, world = outlook["device"], outlook["stop_token"], plan["world"]
    of = "" if stop["share"] is None else f": the last trained target of {stop['share']:.1%} of the samples"
    rate = f", {device['peak_flops'] / 1e12:.0f} bfloat16 TFLOP/s" if device["peak_flops"] else ""
    part = "90 % of a GPU" if device["is_gpu"] else f"90 % of this machine / {counted(world, 'rank')}"
    lines = [
        ("device", f"{device['name']}, {size(device['memory_bytes'])}{rate}"),
        ("time", _time_line(outlook, plan)),
        ("stop token", f"{stop['trained']}{of}"),
        ("trains", "yes" if outlook["compatible"] else "no: " + _what(outlook["problems"])),
        ("fits", f"in {size(device['usable_bytes'])} = {part}:"),
    ]
    text = [f"{name:<16}{line}" for name, line in lines]
    notes = [f"{'note':<16}{note}" for note in outlook.get("notes", ())]
    return "\n".join([*text, *_choice_lines(outlook), *_best_lines(outlook), *notes])


def _what(problems: list[Row]) -> str:
    return "; ".join(Problem(**problem).what for problem in problems)


def _time_line(outlook: Row, plan: Row) -> str:
    hours, device, totals = outlook["hours"], outlook["device"], plan["totals"]
    if hours is None:
        return "not known without a GPU's rate: --gpu h100, or --gpu-memory 80 --gpu-tflops 312"
    all_ranks = f"{counted(plan['world'], 'rank')} x {device['peak_flops'] / 1e12:.0f} TFLOP/s"
    return (
        f"{duration(hours * 3600)} of training = {work(totals['flops'])} x "
        f"{1 + totals['imbalance']:.3f} / ({all_ranks} x {outlook['mfu']:.0%} MFU)"
    )


def _choice_lines(outlook: Row) -> Iterator[str]:
    """A line for each DeepSpeed configuration; * is the recipe's."""
    yield f"  {'deepspeed':<16}{'a rank':>10}{'host':>10}  fits"
    for row in outlook["ds_configs"]:
        mark = "*" if row["name"] == outlook["deepspeed"] else " "
        verdict = "refused" if row["refusal"] else "yes" if row["fits"] else "no"
        sizes = f"{size(row['device_bytes']):>10}{size(row['host_bytes']):>10}"
        yield f"{mark} {row['name']:<16}{sizes}  {verdict}"
    for reason in dict.fromkeys(row["refusal"] for row in outlook["ds_configs"] if row["refusal"]):
        yield f"  refused: {reason}"


def _best_lines(outlook: Row) -> Iterator[str]:
    best, others = outlook["best"], "; ".join(outlook["would_fit"])
    if best:
        yield f"{'best':<16}deepspeed: {best}, the first that fits, fastest first (* is the recipe's)"
        if others:
            yield f"{'':<16}these would fit without offload: {others}"
    elif others:
        yield f"{'best':<16}none fits; these would: {others}"
    else:
        yield f"{'best':<16}none fits, nor with a smaller capacity, LoRA, QLoRA or more ranks"
