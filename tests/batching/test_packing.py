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
    within = [[lengths[i] for i in packs[p]] for p in range(len(packs))]
    assert all(some == sorted(some, reverse=True) for some in within), (
        "longest first, so equal ones are together"
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 64))
def test_no_more_packs_than_sample_by_sample_best_fit(lengths, capacity):
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    assert len(pack(lengths, capacity=capacity, seed=0)) <= len(rooms)


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
def test_real_lengths_reach_the_optimum_and_packs_are_mixed_anew():
    """Two samples that share a pack share one with another seed at most twice as often as chance."""
    lengths = np.load(Path(DATA) / "lengths" / "alpaca52k_smollm2.npy")
    first, second = (pack(lengths, capacity=4096, seed=seed) for seed in (5, 6))
    assert len(first) == len(second) == 978 == -(-int(lengths.sum()) // 4096)
    pack_in_second = np.empty(len(lengths), int)
    pack_in_second[second.indices] = np.repeat(np.arange(978), np.diff(second.offsets))
    pairs = again = 0
    for p in range(len(first)):
        together = np.unique(pack_in_second[first[p]], return_counts=True)[1]
        again += int((together * (together - 1) // 2).sum())
        pairs += len(first[p]) * (len(first[p]) - 1) // 2
    sizes = np.diff(second.offsets)
    chance = (sizes * (sizes - 1)).sum() / (len(lengths) * (len(lengths) - 1))
    assert pairs > 1_000_000
    assert again / pairs <= 2 * chance
