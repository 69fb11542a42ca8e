"""Samples of one unit share a pack in every step, on any number of ranks; without units nothing changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.batching.packing import pack
from sftcore.batching.schedule import Schedule
from sftcore.batching.units import Units
from sftcore.errors import UserInputError

CAPACITY = 32
MODES = [{"samples_per_step": 5}, {"samples_per_step": 1}, {"samples_per_step": 40}, {"tokens_per_step": 64}]
PAIRED = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 30)), min_size=1, max_size=60)


def schedule_of(lengths, units, *, world=1, seed=1, **mode) -> Schedule:
    return Schedule(
        lengths=lengths,
        num_trained=np.ones(len(lengths), int),
        units=units,
        capacity=CAPACITY,
        seed=seed,
        epochs=2,
        world=world,
        **mode,
    )


@settings(max_examples=200, deadline=None)
@given(samples=PAIRED, mode=st.sampled_from(MODES), world=st.integers(1, 5), seed=st.integers(0, 9))
def test_units_are_never_parted(samples, mode, world, seed):
    """A unit has four samples at most, of at most eight tokens."""
    earlier = [[n for _, n in samples[:i]].count(number) for i, (_, number) in enumerate(samples)]
    units = [number + 100 * (k // 4) for (_, number), k in zip(samples, earlier, strict=True)]
    lengths = np.array([length for length, _ in samples])
    alone = schedule_of(lengths, units, seed=seed, **mode)
    many = schedule_of(lengths, units, seed=seed, world=world, **mode)
    assert alone.fingerprint == many.fingerprint and alone.num_steps == many.num_steps
    epochs: dict[int, list[int]] = {0: [], 1: []}
    for number in range(many.num_steps):
        step = many.step(number)
        assert sorted(step.samples) == sorted(alone.step(number).samples)
        epochs[step.epoch] += step.samples.tolist()
        for members in step.packs:
            assert lengths[members].sum() <= CAPACITY
            inside = {units[i] for i in members}
            assert sorted(members) == [i for i, unit in enumerate(units) if unit in inside]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(samples)))
    assert lengths[many.largest_pack].sum() <= CAPACITY


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60),
    mode=st.sampled_from(MODES),
    world=st.integers(1, 4),
)
def test_units_of_one_sample_are_samples(lengths, mode, world):
    """Bit for bit the packs of a schedule without units."""
    plain = schedule_of(lengths, None, world=world, **mode)
    single = schedule_of(lengths, np.arange(len(lengths)), world=world, **mode)
    assert plain.num_steps == single.num_steps and plain.fingerprint != single.fingerprint
    for number in range(plain.num_steps):
        for one, other in zip(plain.step(number).packs, single.step(number).packs, strict=True):
            assert one.tolist() == other.tolist()


def test_packs_without_units_are_those_of_the_plain_packer():
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 300)
    schedule = schedule_of(lengths, None, tokens_per_step=CAPACITY)
    seed = int(np.random.SeedSequence((1, 0)).generate_state(1, np.uint64)[0] >> 1)
    packs = pack(lengths, capacity=CAPACITY, seed=seed)
    assert [schedule.step(n).packs[0].tolist() for n in range(5)] == [packs[n].tolist() for n in range(5)]


def test_pairs_make_steps_of_whole_pairs():
    """Twelve pairs, steps of eight samples: three steps of four pairs."""
    units = np.repeat(np.arange(12), 2)[np.random.default_rng(0).permutation(24)]
    schedule = schedule_of(np.full(24, 3), units, samples_per_step=8)
    assert schedule.num_steps == 6
    for number in range(6):
        counts = np.unique(units[schedule.step(number).samples], return_counts=True)[1]
        assert counts.tolist() == [2, 2, 2, 2]
    assert Units(units).total(np.ones(24, int)).tolist() == [2] * 12


def test_a_unit_that_no_pack_holds_and_mixed_sources_are_refused():
    with pytest.raises(
        UserInputError, match=r"(?s)more tokens than it holds: 0, 2\n.*got: 32\n.*allowed: 33 or more"
    ):
        schedule_of([20, 20, 13], [4, 5, 4], samples_per_step=2)
    with pytest.raises(UserInputError, match="sources are mixed"):
        Schedule(
            lengths=[1, 1],
            num_trained=[1, 1],
            units=[0, 0],
            sources=[0, 1],
            source_counts=[1, 1],
            capacity=8,
            seed=0,
            epochs=1,
            world=1,
            samples_per_step=1,
        )


def test_a_plan_keeps_its_earlier_name():
    """As committed by versions that hashed JSON: their checkpoints go on."""
    schedule = schedule_of([3, 1, 2], None, samples_per_step=2)
    assert schedule.earlier_fingerprint == "04e543b5a6461921"
    assert schedule.fingerprint != schedule.earlier_fingerprint
    assert schedule.fingerprint != schedule_of([3, 2, 1], None, samples_per_step=2).fingerprint
