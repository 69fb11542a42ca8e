"""What must hold for a report's sentences: no change claimed without significance, no weakness kept quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sftcore.fsio import read_jsonl, write_json, write_jsonl
from sftcore.study.report import write_report
from sftcore.study.wording import describe_change


def test_the_sentence_says_rose_fell_or_chance(run: Path, fake: Any) -> None:
    sentence = fake.report()["verdict"][0]
    expected = "Accuracy on 40 held-out facts rose from 10.0 % [4.0, 23.1] to 40.0 % [26.3, 55.4]: "
    assert sentence == expected + "13 facts gained, 1 lost (McNemar p = 0.002)."
    base, tuned = (run / "eval" / model for model in ("base", "tuned"))
    base.rename(run / "swap")
    tuned.rename(base)
    (run / "swap").rename(tuned)
    assert "held-out facts fell from 40.0 %" in fake.report()["verdict"][0]
    fake.write_evaluation("tuned", fake.predictions({1, 2, 20} | set(range(21, 34))))  # 1 gained, 1 lost
    assert "did not change beyond chance: 40.0 %" in fake.report()["verdict"][0]


@given(gained=st.integers(0, 30), lost=st.integers(0, 30), p_value=st.floats(0, 1))
def test_no_change_is_claimed_without_significance(gained: int, lost: int, p_value: float) -> None:
    block: dict[str, Any] = {
        key: {"a": 0.5, "l": 0.4, "h": 0.6}[key[0]]
        for key in ("acc_base", "low_base", "high_base", "acc_tuned", "low_tuned", "high_tuned")
    }
    change = {"gained": gained, "lost": lost, "p_value": p_value}
    sentence = describe_change(block | {"n": 60, "paired_change": change}, items="held-out facts")
    assert (" rose " in sentence or " fell " in sentence) == (p_value < 0.05)
    assert ("beyond chance" in sentence) == (p_value >= 0.05)


def test_a_whole_run_has_only_the_standing_note_and_small_levels(run: Path, fake: Any) -> None:
    notes = fake.report()["notes"]
    assert notes[0] == "Fewer than 30 test items, read with care: level 1 (20), level 3 (20)."
    assert len(notes) == 2 and notes[1].startswith("One run, one training draw, one seed")


def test_notes_tell_what_weakens_the_numbers(run: Path, fake: Any) -> None:
    probe = {"model_fingerprint": "bb", "settings": {"templates": 4, "samples": 5, "temperature": 1.0}}
    write_json(run / "levels.manifest.json", probe)
    write_json(run / "environment.json", {"model_fingerprint": "aa", "quantised_weights": "Q4_K_M GGUF"})
    fake.write_recipe({"adapter": {"kind": "qlora"}})
    write_json(run / "plan.json", {"totals": {"num_steps": 9}})
    metrics = read_jsonl(run / "metrics.jsonl")
    write_jsonl(run / "metrics.jsonl", [*metrics[:4], *metrics[2:]])
    for model in ("base", "tuned"):
        rows = read_jsonl(run / "eval" / model / "predictions.jsonl")
        fake.write_evaluation(model, [rows[0] | {"level": None}, *rows[1:]])
    notes = "\n".join(fake.report()["notes"])
    for expected in (
        "quantised (Q4_K_M GGUF)",
        "QLoRA: the base weights were held in 4 bits",
        "belong to another model (fingerprint bb)",
        "4 templates x 5 samples instead of the paper's 21 x 10",
        "20 trials has a 95 % interval of up to ±0.22",
        "temperature 1.0 instead of 0.7",
        "1 test item without a memory level",
        "5 of 9 planned steps",
        "2 steps were done more than once",
    ):
        assert expected in notes
    assert fake.report()["training"]["num_tokens"] == 50


def test_the_terminal_table_aligns_and_carries_the_numbers(run: Path) -> None:
    lines = write_report(run).table.split("\n")
    assert lines[0] == "tiny & small (smollm2-135m)"
    head = next(line for line in lines if line.startswith("split"))
    level_1 = next(line for line in lines if line.startswith("test   level 1"))
    assert level_1[head.index("before") :].startswith("15.0 % [5.2, 36.0]")
    assert level_1[head.index("after") :].startswith("10.0 % [2.8, 30.1]")
    assert "training: 5 steps, loss 3.500 -> 1.500, 5.0 s" in lines
