"""Which configuration fits: the fastest that does, what is refused, what would help where none does."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import write_recipe
from transformers import Qwen2Config

from sftcore.model.cost import measure_recipe
from sftcore.recipe import load_recipe
from sftcore.train import fit
from sftcore.train.compatibility import ROWS
from sftcore.train.devices import Device
from sftcore.train.fit import (
    FASTEST_FIRST,
    ON_REQUEST,
    Choice,
    Place,
    best_choice,
    configuration_name,
    list_choices,
    what_would_fit,
)

SEVEN_B = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}


COSTS: dict = {}  # an adapter on 7B takes 3 s to count


@pytest.fixture
def seven_b(tiny_recipe, tmp_path, monkeypatch):
    """A recipe of Qwen2.5-7B's shape; its folder has a config.json and nothing else."""
    Qwen2Config(**SEVEN_B).save_pretrained(tmp_path / "shape")

    def measured(recipe):
        is_full = recipe.adapter.kind == "none"
        COSTS[is_full] = COSTS.get(is_full) or measure_recipe(recipe)
        return COSTS[is_full]

    monkeypatch.setattr(fit, "measure_recipe", measured)

    def make(**changes):
        base = tiny_recipe | {"model": {"path": str(tmp_path / "shape"), "dtype": "bfloat16"}}
        base["batch"] = {"samples_per_step": 128, "capacity": 8192}
        base["train"] = {"activation_checkpointing": "full"}
        return load_recipe(write_recipe(base, "big", **changes))

    return make


def place(gigabytes: float, *, world: int = 8, num_tokens: int = 1000, is_gpu: bool = True) -> Place:
    device = Device(name="d", is_gpu=is_gpu, memory_bytes=int(gigabytes * 1e9))
    return Place(device=device, world=world, num_tokens=num_tokens, longest=100)


def test_every_shipped_configuration_has_its_place_in_the_order():
    assert sorted([*FASTEST_FIRST, *ON_REQUEST]) == sorted(ROWS)


@pytest.mark.parametrize(
    ("gigabytes", "best"),
    [
        (180, "zero0"),
        (80, "zero1"),
        (45, "zero2"),
        (30, "zero3"),
        (24, "zero2-offload"),
        (10, "zero3-offload"),
    ],
)
def test_the_fastest_that_fits_is_the_best(seven_b, gigabytes, best):
    """7.6 billion parameters on 8 ranks: 16 bytes each at stage 0, 2 + 4 + 12 / 8 at 1, 2 + 16 / 8 at 2."""
    choices = list_choices(seven_b(), place(gigabytes))
    assert best_choice(choices).name == best
    earlier = [c for c in choices if c.name in FASTEST_FIRST[: FASTEST_FIRST.index(best)]]
    assert not any(choice.fits for choice in earlier)
    assert [choice.name for choice in choices if choice.refusal] == ["zero3-nvme"]


def test_what_offload_takes_from_the_gpu_is_on_the_host(seven_b):
    by_name = {choice.name: choice for choice in list_choices(seven_b(), place(80))}
    for stage in ("zero2", "zero3"):
        off = by_name[f"{stage}-offload"]
        assert off.device_bytes < by_name[stage].device_bytes
        assert off.host_bytes > by_name[stage].host_bytes == 0
    parameters = 7_615_616_512
    assert by_name["zero2-offload"].host_bytes == pytest.approx(16 * parameters / 8)


def test_muon_has_one_choice_and_cpus_no_zeropp(seven_b):
    muon = list_choices(seven_b(train={"optimizer": "muon"}), place(180))
    assert [choice.name for choice in muon if not choice.refusal] == ["zero0"]
    cpus = {c.name: c for c in list_choices(seven_b(), place(10_000, is_gpu=False))}
    assert "CUDA" in cpus["zeropp"].refusal and best_choice(list(cpus.values())).name == "zero0"
    assert cpus["zero2-offload"].host_bytes == 0


def test_nvme_is_a_choice_where_it_works_and_zeropp_only_by_name():
    fitting = {"device_bytes": 1, "host_bytes": 0, "fits": True, "refusal": ""}
    nvme, zeropp = (Choice(name=name, **fitting) for name in ("zero3-nvme", "zeropp"))
    assert best_choice([zeropp, nvme]) == nvme and best_choice([zeropp]) is None


def test_a_file_of_the_users_own_is_judged_first(seven_b):
    Path("mine.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1}}')
    recipe = seven_b(deepspeed="mine.json")
    own, *shipped = list_choices(recipe, place(80))
    assert own.name == configuration_name(recipe) == str(Path("mine.json").resolve())
    zero2 = next(choice for choice in shipped if choice.name == "zero2")
    assert zero2.device_bytes >= own.device_bytes and len(shipped) == len(ROWS)


def ways_out(recipe, at: Place, *, with_offload: bool = True) -> list[str]:
    """What changes, of texts such as `batch.capacity: 1024 (zero3-offload: 9.8 GB)`."""
    texts = what_would_fit(recipe, at, with_offload=with_offload)
    assert all(text.endswith(" GB)") and ": " in text.split(" (")[1] for text in texts)
    return [text.split(" (")[0] for text in texts]


def test_where_nothing_fits_each_way_out_is_named_with_what_then_fits(seven_b):
    recipe = seven_b(train={"activation_checkpointing": "none"})
    here = place(24, world=1, num_tokens=8000)
    assert best_choice(list_choices(recipe, here)) is None
    assert ways_out(recipe, here) == ["batch.capacity: 2048", "train.activation_checkpointing: full"]


def test_without_offload_more_ranks_and_adapters_are_ways_out(seven_b):
    """4 ranks of 40 GB: stage 3 needs (2 + 4 + 12) / 4 bytes each, 34 GB of states alone."""
    recipe, here = seven_b(), place(40, world=4)
    assert best_choice(list_choices(recipe, here)).host_bytes > 0
    found = ways_out(recipe, here, with_offload=False)
    assert found == ["train.optimizer: adamw-8bit", "adapter.kind: lora", "adapter.kind: qlora", "8 ranks"]
    muon = seven_b(train={"optimizer": "muon"})  # at stage 0 only, where ranks share nothing
    assert not any("ranks" in text for text in ways_out(muon, here))


def test_a_single_change_may_not_do_and_two_may(seven_b):
    recipe = seven_b(train={"activation_checkpointing": "none", "optimizer": "muon"})
    found = ways_out(recipe, place(13, world=1, num_tokens=8000))
    assert found == ["adapter.kind: qlora with train.activation_checkpointing: full"]


def test_capacities_divide_what_a_step_holds(seven_b):
    """A step of 8,192 tokens in packs of 8,192: halves divide it, the longest sample's 1,500 does not."""
    recipe = seven_b(batch={"samples_per_step": None, "tokens_per_step": 8192})
    here = Place(
        device=Device(name="d", is_gpu=True, memory_bytes=int(8.8e9)), world=1, num_tokens=8192, longest=1500
    )
    capacities = [int(t.split()[1]) for t in ways_out(recipe, here) if t.startswith("batch")]
    assert capacities == [2048]


def test_nothing_helps_where_nothing_can(seven_b):
    assert ways_out(seven_b(), place(1)) == ways_out(seven_b(), place(1), with_offload=False) == []
