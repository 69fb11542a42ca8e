"""Packs are a partition within capacity, new every epoch, and as few as can be on real lengths."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.batching.packing import pack

DATA = os.environ.get("SFTCORE_TEST_DATA")


def sizes(lengths, packs) -> list[int]:
    return [int(np.asarray(lengths)[packs[p]].sum()) for p in range(len(packs))]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 100), st.integers(0, 2**31))
def test_each_sample_is_in_one_pack_and_none_is_over_capacity(lengths, capacity, seed):
    packs = pack(lengths, capacity=capacity, seed=seed)
    assert sorted(packs.indices.tolist()) == list(range(len(lengths)))
    assert all(0 < size <= capacity for size in sizes(lengths, packs))
    assert len(packs) >= -(-sum(lengths) // capacity)
    lower_bound = max(1, -(-sum(lengths) // capacity)) if lengths else 0
    assert len(packs) <= 11 / 9 * lower_bound * 1.5 + 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 64))
def test_as_few_packs_as_sample_by_sample_best_fit(lengths, capacity):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    assert len(pack(lengths, capacity=capacity, seed=0)) == len(rooms)


def test_same_seed_same_packs_other_seed_others():
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    first, again, other = (pack(lengths, capacity=128, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.indices, again.indices) and np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.indices, other.indices)


def test_worked_example():
    packs = pack([5, 5, 4, 3, 2, 1], capacity=10, seed=0)
    assert sorted(sizes([5, 5, 4, 3, 2, 1], packs)) == [10, 10]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_lengths_out_of_range_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.10"):
        pack(lengths, capacity=10, seed=0)


def test_nothing_packs_to_nothing():
    assert len(pack([], capacity=10, seed=0)) == 0


@pytest.mark.skipif(not DATA, reason="SFTCORE_TEST_DATA is not set")
def test_real_lengths_reach_the_optimum():
    lengths = np.load(Path(DATA) / "lengths" / "alpaca52k_smollm2.npy")
    packs = pack(lengths, capacity=4096, seed=5)
    assert len(packs) == 978 == -(-int(lengths.sum()) // 4096)
