"""The report on the data: its numbers can be counted by hand; the mixture reaches plan and metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_lines

from sftcore.config import Recipe
from sftcore.data.check import check_store, check_text, draw_check
from sftcore.data.prepare import prepare_store
from sftcore.errors import UserInputError
from sftcore.train.plan import make_schedule


@pytest.fixture
def make(tmp_path):
    def build(train: list[list[dict]], *, test=(), weights=(), **data) -> Recipe:
        for i, rows in enumerate([*train, list(test)]):
            write_lines(tmp_path / f"f{i}.jsonl", rows)
        sources = [{"format": "pairs", "path": str(tmp_path / f"f{i}.jsonl")} for i in range(len(train))]
        for source, weight in zip(sources, weights, strict=False):
            source["weight"] = weight
        held_out = [{"format": "pairs", "path": str(tmp_path / f"f{len(train)}.jsonl")}] if test else []
        return Recipe.model_validate(
            {
                "model": {"path": "m"},
                "task": "matching",
                "data": {"train": sources, "test": held_out, **data},
                "batch": {"samples_per_step": 4, "capacity": 400},
                "train": {"epochs": 2},
            }
        )

    return build


def pairs(prefix: str, n: int, *, num_same: int) -> list[dict]:
    return [
        {"sentence1": f"{prefix}{i}", "sentence2": f"x{prefix}{i}", "label": int(i < num_same)}
        for i in range(n)
    ]


def test_the_report_counts_what_is_there(make, bpe, tmp_path):
    first = pairs("a", 10, num_same=4)
    second = [*pairs("b", 5, num_same=5), first[0], first[9] | {"label": 1}, pairs("c", 1, num_same=1)[0]]
    second[4] = second[4] | {"sentence1": "long " * 300}
    recipe = make([first, second], test=pairs("c", 1, num_same=0), max_reject_fraction=0.2)
    store = prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    report = check_store(recipe, store)
    # 18 rows: 2 contradict each other, 1 leaks, 1 is too long; 14 stay, one of them a copy
    assert (report["num_rows_read"], report["num_samples"]) == (18, 14)
    assert [report[k] for k in ("contradictory", "leaks", "overlength", "duplicates_kept")] == [2, 1, 1, 1]
    assert report["labels"] == {"0": 5, "1": 9}
    assert [source["num_samples"] for source in report["sources"]] == [9, 5]
    assert sum(report["length_histogram"]["num_samples"]) == 14
    assert report["length_quantiles"]["100"] == store.lengths.max()
    assert report["trained_share"] == pytest.approx(store.num_trained.sum() / store.lengths.sum())
    text = check_text(report)
    for expected in ("14 of 18 rows", "0: 5 (35.7%)", "1 kept, 0 dropped", "f1.jsonl: 5 samples"):
        assert expected in text
    report["sources"][0]["name"] = "$x^{$ \x1b[0m \udcff [red].jsonl"  # a file's name may be anything
    draw_check(report, tmp_path / "run/check.png")
    assert (tmp_path / "run/check.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("weights", "data", "expected"),
    [((), {}, [6, 18]), ((3, 1), {}, [18, 6]), ((), {"temperature": 1e9}, [12, 12])],
)
def test_weights_and_temperature_reach_the_schedule(make, bpe, tmp_path, weights, data, expected):
    recipe = make([pairs("a", 6, num_same=3), pairs("b", 18, num_same=9)], weights=weights, **data)
    store = prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    schedule = make_schedule(recipe, store, world=2)
    steps = [schedule.step(i) for i in range(schedule.num_steps)]
    for epoch in (0, 1):
        counts = np.sum([schedule.samples_by_source(s) for s in steps if s.epoch == epoch], axis=0)
        assert counts.tolist() == expected
    assert [source["name"] for source in store.manifest["sources"]] == ["f0.jsonl", "f1.jsonl"]


def test_a_weighted_source_without_samples_is_named(make, bpe, tmp_path):
    rows = pairs("a", 6, num_same=3)
    recipe = make([rows, pairs("c", 1, num_same=1)], test=pairs("c", 1, num_same=1), weights=(1, 1))
    store = prepare_store(recipe, bpe, cache_root=tmp_path / "s")
    with pytest.raises(UserInputError, match="data.train.1: no sample is left of this mixed source"):
        make_schedule(recipe, store, world=1)


@pytest.mark.parametrize(
    ("weights", "data", "message"),
    [((1,), {}, "to all training sources, or to none"), ((1, 1), {"temperature": 2}, "not both")],
)
def test_mixtures_that_make_no_sense(make, weights, data, message):
    with pytest.raises(ValueError, match=message):
        make([pairs("a", 2, num_same=1), pairs("b", 2, num_same=1)], weights=weights, **data)


def test_held_out_sources_take_no_weight(make):
    values = make([pairs("a", 2, num_same=1)]).model_dump()
    values["data"]["test"] = [{"format": "pairs", "path": str(Path("x")), "weight": 2}]
    with pytest.raises(ValueError, match="held-out ones are always read whole"):
        Recipe.model_validate(values)
