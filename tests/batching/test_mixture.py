"""Mixtures: shares as asked for, each sample of a source equally often, the same on any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcore.batching.mixture import draw_epoch, samples_per_epoch, temperature_shares
from sftcore.batching.schedule import Schedule

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(SIZES, st.data())
@settings(max_examples=200, deadline=None)
def test_samples_of_a_source_are_used_equally_often(sizes, data):
    counts = [data.draw(st.integers(1, 30)) for _ in sizes]
    epochs, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 9))
    sources = np.repeat(np.arange(len(sizes)), sizes)
    uses: Counter[int] = Counter()
    for epoch in range(epochs):
        drawn = draw_epoch(sources, counts, seed=seed, epoch=epoch)
        assert np.bincount(sources[drawn], minlength=len(sizes)).tolist() == counts
        uses.update(drawn.tolist())
    for source, count in enumerate(counts):
        per_sample = [uses[i] for i in np.flatnonzero(sources == source).tolist()]
        assert sum(per_sample) == count * epochs
        assert max(per_sample) - min(per_sample) <= 1


@given(st.integers(1, 1000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_counts_follow_the_weights(num_samples, weights):
    counts = samples_per_epoch(num_samples, weights)
    assert all(
        count == 1 or abs(count - num_samples * weight / sum(weights)) <= 1
        for count, weight in zip(counts, weights, strict=True)
    )
    assert sum(counts) >= num_samples and min(counts) >= 1


def test_temperature_one_keeps_the_sizes_and_a_high_one_evens_them_out():
    assert temperature_shares([10, 30], 1.0) == pytest.approx([0.25, 0.75])
    assert temperature_shares([10, 1000], 1e9) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("mode", [{"samples_per_step": 5}, {"tokens_per_step": 64}])
def test_a_mixed_schedule_is_the_same_on_any_number_of_ranks(mode):
    lengths = np.random.default_rng(0).integers(1, 32, 50)
    sources = np.repeat([0, 1], [10, 40])

    def make(world: int, counts=(30, 20)) -> Schedule:
        return Schedule(
            lengths=lengths, num_trained=np.ones(50), capacity=32, seed=3, epochs=3, world=world,
            sources=sources, source_counts=counts, **mode,
        )  # fmt: skip

    one, three = make(1), make(3)
    assert one.fingerprint == three.fingerprint != make(1, (20, 30)).fingerprint
    assert one.num_samples == 50 and one.num_steps == three.num_steps
    per_epoch = np.zeros((3, 2), int)
    contents: list[set[int]] = [set(), set(), set()]
    for number in range(one.num_steps):
        step = one.step(number)
        assert sorted(step.samples) == sorted(three.step(number).samples)
        assert step.num_tokens == lengths[step.samples].sum()
        per_epoch[step.epoch] += one.samples_by_source(step)
        contents[step.epoch] |= set(step.samples[sources[step.samples] == 1].tolist())
    assert per_epoch.tolist() == [[30, 20]] * 3
    assert contents[0] != contents[1] and len(contents[0] | contents[1]) == 40  # resampled; then all seen
    assert contents[2] != contents[0]


def test_without_counts_nothing_changes():
    settings_ = {"lengths": [3, 1, 2], "num_trained": [1, 1, 1], "capacity": 8, "seed": 0, "epochs": 1}
    plain = Schedule(**settings_, world=1, samples_per_step=2)
    with_sources = Schedule(**settings_, world=1, samples_per_step=2, sources=[0, 1, 1])
    assert plain.fingerprint == with_sources.fingerprint
    assert [plain.step(i).samples.tolist() for i in (0, 1)] == [
        with_sources.step(i).samples.tolist() for i in (0, 1)
    ]
    assert sum(np.array(with_sources.samples_by_source(with_sources.step(i))) for i in (0, 1)).tolist() == [
        1,
        2,
    ]
