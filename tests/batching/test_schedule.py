"""What a step holds does not depend on the world size; each sample runs once per epoch; dealing is even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.batching.dealing import IDLE, deal
from sftcore.batching.packing import constant_num_packs, pack
from sftcore.batching.schedule import CostCoefficients, Schedule

MODES = [{"samples_per_step": 5}, {"samples_per_step": 1}, {"tokens_per_step": 64}, {"tokens_per_step": 32}]
MODES += [{"samples_per_step": 20}, {"samples_per_step": 64}]


CASES = {
    "lengths": st.lists(st.integers(1, 32), min_size=1, max_size=90),
    "mode": st.sampled_from(MODES),
    "world": st.integers(1, 33),
    "seed": st.integers(0, 99),
}


def make(lengths, world=1, **changes) -> Schedule:
    settings_ = {"capacity": 32, "seed": 1, "epochs": 2, "samples_per_step": 5} | changes
    if "tokens_per_step" in changes:
        settings_.pop("samples_per_step")
    return Schedule(lengths=lengths, num_trained=[1 + n // 4 for n in lengths], world=world, **settings_)


@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_content_is_independent_of_the_world_and_complete(lengths, mode, world, seed):
    check_content(lengths, mode, world, seed)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(**CASES)
def test_content_is_complete_in_ten_thousand_cases(lengths, mode, world, seed):
    check_content(lengths, mode, world, seed)


def check_content(lengths, mode, world, seed):
    alone, many = make(lengths, seed=seed, **mode), make(lengths, world=world, seed=seed, **mode)
    assert alone.fingerprint == many.fingerprint
    assert alone.num_steps == many.num_steps
    seen: dict[int, list[int]] = {0: [], 1: []}
    for number in range(alone.num_steps):
        one, other = alone.step(number), many.step(number)
        assert sorted(one.samples) == sorted(other.samples)
        assert (
            one.num_trained_tokens
            == other.num_trained_tokens
            == sum(1 + lengths[i] // 4 for i in one.samples)
        )
        assert one.num_tokens == sum(lengths[i] for i in one.samples)
        assert all(sum(lengths[i] for i in p) <= 32 for p in other.packs)
        seen[one.epoch] += one.samples.tolist()
        dealt = many.deal(other)
        assert sorted(dealt[dealt != IDLE]) == list(range(len(other.packs)))
        assert dealt.shape == (world, -(-len(other.packs) // world))
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(len(lengths)))


def test_no_rank_idles_while_a_step_has_samples():
    step = (schedule := make([2] * 8, world=4, samples_per_step=8)).step(0)
    assert len(step.packs) == 4
    assert (schedule.deal(step) != IDLE).all()
    few = make([2] * 8, world=6, samples_per_step=3).step(0)
    assert len(few.packs) == 3


def test_packs_of_so_many_samples_are_a_multiple_of_the_ranks():
    """9 packs on 8 ranks would take as long as 16: half of the step seven ranks would wait."""
    lengths = np.random.default_rng(0).integers(1, 400, 640)
    schedule = make(lengths, world=8, samples_per_step=64, capacity=1500)
    for number in range(schedule.num_steps):
        step = schedule.step(number)
        loads = [sum(schedule.pack_cost(step.packs[p]) for p in row) for row in schedule.deal(step)]
        assert len(step.packs) % 8 == 0 and (schedule.deal(step) != IDLE).all()
        assert max(loads) < 1.02 * np.mean(loads)


def test_ranks_hardly_wait_where_few_samples_cost_as_much_as_a_hundred():
    rng = np.random.default_rng(0)
    lengths = np.minimum((rng.pareto(1.2, 6000) + 1) * 60, 8192).astype(int)
    heavy = {"capacity": 8192, "samples_per_step": 600, "cost": CostCoefficients(per_token=3e4, per_square=1)}
    schedule = make(lengths, world=8, **heavy)
    slowest, mean = 0.0, 0.0
    for step in map(schedule.step, range(10)):
        loads = [sum(schedule.pack_cost(step.packs[p]) for p in row) for row in schedule.deal(step)]
        slowest, mean = slowest + max(loads), mean + np.mean(loads)
    assert slowest / mean < 1.01


def test_packs_are_spread_by_what_they_cost():
    """One long document costs as much as four short ones of twice its tokens: it gets a pack of its own."""
    schedule = make([8, 4, 4, 4, 4], world=2, samples_per_step=5, cost=CostCoefficients(per_square=1))
    assert sorted(map(len, schedule.step(0).packs)) == [1, 4]
    assert sorted(map(len, make([8, 4, 4, 4, 4], world=2).step(0).packs)) == [2, 3]


@pytest.mark.parametrize("world", [9, 16, 17, 32])
def test_packs_for_many_ranks_stay_within_capacity(world):
    """Long samples dealt first leave rooms of 12 where 16 tokens are left over."""
    half = 4 if world == 9 else (world - 1) // 2
    schedule = make(
        [15] * (2 * half) + [10] * (3 * half), world=world, samples_per_step=5 * half, capacity=30
    )
    step = schedule.step(0)
    assert max(30, *(schedule.lengths[p].sum() for p in step.packs)) == 30
    assert sorted(step.samples) == list(range(5 * half))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [1, 3])
def test_the_largest_pack_is_that_of_any_step(mode, world):
    schedule = make(np.random.default_rng(1).integers(1, 32, 150), world=world, **mode)
    packs = [pack for number in range(schedule.num_steps) for pack in schedule.step(number).packs]
    largest = max(int(schedule.lengths[pack].sum()) for pack in packs)
    assert schedule.lengths[schedule.largest_pack].sum() == largest
    assert any(set(schedule.largest_pack) <= set(pack) for pack in packs)


def test_the_largest_pack_of_many_steps_is_found_without_packing_them(monkeypatch):
    schedule = make(np.random.default_rng(1).integers(1, 8, 30_000), samples_per_step=4)
    largest = max(int(schedule.lengths[schedule.step(s).samples].sum()) for s in range(schedule.num_steps))
    steps = []
    monkeypatch.setattr(Schedule, "_packs_of", lambda self, e, n: steps.append(n) or (np.array([0]),))
    fresh = make(schedule.lengths, samples_per_step=4)
    assert fresh.num_steps == 15_000 and largest == 28
    assert fresh.largest_pack is not None and len(steps) <= 600


def test_the_last_step_is_smaller_and_nothing_is_dropped():
    schedule = make([4] * 12, samples_per_step=5)
    assert [schedule.step(s).num_samples for s in range(schedule.num_steps)] == [5, 5, 2, 5, 5, 2]


def test_epochs_are_shuffled_anew():
    schedule = make(list(range(1, 31)), samples_per_step=30)
    assert schedule.step(0).samples.tolist() != schedule.step(1).samples.tolist()


def test_steps_are_random_access():
    schedule = make(np.random.default_rng(0).integers(1, 32, 200), tokens_per_step=64)
    late = schedule.num_steps - 1
    fresh = make(np.random.default_rng(0).integers(1, 32, 200), tokens_per_step=64)
    assert fresh.step(late).samples.tolist() == schedule.step(late).samples.tolist()
    with pytest.raises(IndexError, match="outside 0"):
        schedule.step(schedule.num_steps)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_dealing_is_never_worse_than_one_largest_pack_above_the_mean(costs, world):
    dealt = deal(costs, world=world)
    loads = [sum(costs[p] for p in row if p != IDLE) for row in dealt]
    assert max(loads) <= sum(costs) / world + max(costs) + 1e-9


def test_dealing_evens_out_a_heavy_tail_better_than_dealing_in_order():
    costs = np.random.default_rng(0).pareto(1.5, 64) + 1
    dealt = deal(costs, world=8)
    in_order = costs.reshape(8, 8).sum(1)
    loads = costs[dealt].sum(1)
    assert loads.max() / loads.mean() < in_order.max() / in_order.mean()


def test_cost_counts_tokens_squares_and_trained_tokens():
    schedule = make([3, 4], cost=CostCoefficients(per_token=1, per_square=10, per_trained=100))
    assert schedule.pack_cost(np.array([0, 1])) == 7 + 10 * 25 + 100 * (1 + 2)


def test_a_hundred_thousand_epochs_are_counted_without_packing_each(monkeypatch):
    lengths = [7, 9, 20, 30, 5]
    by_samples = make(lengths, epochs=100_000)
    assert by_samples.num_steps == 100_000 and by_samples.step(99_999).epoch == 99_999
    packed = []
    by_tokens = make(lengths, tokens_per_step=32, epochs=100_000)
    monkeypatch.setattr(by_tokens, "_pack_epoch", packed.append)
    assert by_tokens.num_steps == 300_000 and packed == []  # 71 tokens in packs of 32
    assert len(make(lengths, tokens_per_step=32).step(5).packs) == 1


@settings(max_examples=200, deadline=None)
@given(lengths=CASES["lengths"], seed=CASES["seed"])
def test_a_constant_number_of_packs_is_that_of_every_seed(lengths, seed):
    known = constant_num_packs(np.array(lengths), capacity=32)
    assert known in (None, len(pack(lengths, capacity=32, seed=seed)))
