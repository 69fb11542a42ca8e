"""A level is used for the fact that was probed and for no other; what changed since is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sftcore.data.contents import Completion, Fact
from sftcore.data.records import Record
from sftcore.errors import UserInputError
from sftcore.fsio import write_json, write_jsonl
from sftcore.knowledge.level_files import LEVELS_FILE, LEVELS_MANIFEST, check_same_facts, read_levels
from sftcore.knowledge.levels import FactLevel

WHERE = Path("RUN/levels.jsonl")
NAMES = ("Peru", "Chad", "Iran")


def records(names=NAMES, split="train") -> list[Record]:
    """Facts named by their place, as rows without ids are."""
    facts = [Fact(relation="P36", subject=name, answers=(f"{name} City",)) for name in names]
    return [Record(id=f"f:{i}", split=split, file="f", row=i, content=c) for i, c in enumerate(facts, 1)]


def levels_of(found: list[Record]) -> list[FactLevel]:
    return [
        FactLevel(
            id=record.id,
            split=record.split,
            relation=record.content.relation,
            subject=record.content.subject,
            answers=record.content.answers,
            hits=1,
            trials=4,
        )
        for record in found
    ]


def test_levels_of_todays_facts_pass_in_any_order_and_with_facts_that_were_not_probed():
    levels = levels_of(records())
    check_same_facts(levels, records(), where=WHERE)
    check_same_facts(levels[::-1], records((*NAMES, "Mali")), where=WHERE)


def test_a_row_at_the_top_makes_every_level_behind_it_stale():
    levels = levels_of(records())
    with pytest.raises(UserInputError, match="3 of 3 memory levels belong to facts that the data has no"):
        check_same_facts(levels, records(("Mali", *NAMES)), where=WHERE)
    with pytest.raises(UserInputError, match="got: train fact 'f:3' is P36, Mali: Mali City") as refused:
        check_same_facts(levels, records((*NAMES[:2], "Mali", "Iran")), where=WHERE)
    message = str(refused.value)
    assert "1 of 3" in message and "P36, Iran: Iran City, as it was probed" in message
    assert "sftcore probe RECIPE" in message and str(WHERE) in message


def test_a_fact_that_has_gone_or_is_another_splits_or_no_fact_is_named():
    levels = levels_of(records())
    with pytest.raises(UserInputError, match=r"1 of 3 .*\n.*'f:3' is not there"):
        check_same_facts(levels, records()[:2], where=WHERE)
    with pytest.raises(UserInputError, match="3 of 3"):
        check_same_facts(levels, records(split="test"), where=WHERE)
    other = replace(records()[0], content=Completion(prompt="a", completion="b"))
    with pytest.raises(UserInputError, match="'f:1' is not a fact"):
        check_same_facts(levels, [other, *records()[1:]], where=WHERE)


@pytest.mark.parametrize("changed", [{"relation": "P17"}, {"subject": "peru"}, {"answers": ("Lima",)}])
def test_each_part_of_a_fact_counts(changed):
    first, *others = records()
    edited = replace(first, content=replace(first.content, **changed))
    with pytest.raises(UserInputError, match="1 of 3"):
        check_same_facts(levels_of(records()), [edited, *others], where=WHERE)


@pytest.mark.parametrize(("code", "is_of_earlier_version"), [({}, True), ({"code": 1}, False)])
def test_levels_of_another_fingerprint_may_be_an_earlier_versions(tmp_path, code, is_of_earlier_version):
    """A version ago the same model had another fingerprint."""
    write_jsonl(tmp_path / LEVELS_FILE, [level.to_row() for level in levels_of(records())])
    write_json(tmp_path / LEVELS_MANIFEST, {**code, "model_fingerprint": "then"})
    with pytest.raises(UserInputError, match="belong to another model") as refused:
        read_levels(tmp_path, model_fingerprint="now", dtype="float32")
    assert ("measured by an earlier version" in str(refused.value)) == is_of_earlier_version


def test_levels_of_another_dtype_are_named(tmp_path):
    """Levels that name no dtype are of a version whose recipe does."""
    write_jsonl(tmp_path / LEVELS_FILE, [level.to_row() for level in levels_of(records())])
    write_json(tmp_path / LEVELS_MANIFEST, {"code": 1, "model_fingerprint": "now", "dtype": "bfloat16"})
    with pytest.raises(UserInputError, match="another dtype") as refused:
        read_levels(tmp_path, model_fingerprint="now", dtype="float32")
    assert "--set model.dtype=bfloat16" in str(refused.value)
    assert len(read_levels(tmp_path, model_fingerprint="now", dtype="bfloat16")) == 3
    write_json(tmp_path / LEVELS_MANIFEST, {"code": 1, "model_fingerprint": "now"})
    assert len(read_levels(tmp_path, model_fingerprint="now", dtype="float32")) == 3
