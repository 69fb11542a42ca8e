"""What must hold for reading a run: a damaged or contradictory file is an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcore.errors import UserInputError
from sftcore.evaluate.score import score
from sftcore.fsio import read_json, write_json
from sftcore.study.report import write_report
from sftcore.study.run_folder import read_run


def test_scores_that_contradict_predictions_are_refused(run: Path, fake: Any) -> None:
    path = run / "eval" / "tuned" / "scores.json"
    scores = read_json(path)
    write_json(path, scores | {"checked_by": "an added key is no contradiction"})
    write_report(run)
    scores["splits"]["test"]["by_level"]["3"]["correct"] = 13
    write_json(path, scores)
    expected = (
        r"by_level\.3\.correct: .*eval/tuned/scores\.json doesn't follow from .*eval/tuned/predictions\.jsonl"
        r"\n    got: 13 in scores\.json, 14 counted"
    )
    with pytest.raises(UserInputError, match=expected):
        write_report(run)
    write_json(path, {"n": 40})
    with pytest.raises(UserInputError, match="split: (.|\n)*nothing in scores.json, test counted"):
        write_report(run)
    write_json(path, score(fake.predictions(set())) | {"by_level": 3})
    with pytest.raises(UserInputError, match=r"scores\.json doesn't follow"):
        write_report(run)


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"no recipe\.yaml(.|\n)*do: give the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UserInputError, match=r"nowhere: not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.yaml", b"a: [", r"recipe\.yaml: not valid YAML"),
        ("recipe.yaml", b"\xff\xfe", r"recipe\.yaml: not valid YAML"),
        ("recipe.yaml", b"- a\n", r"recipe\.yaml: must be a mapping\n    got: list"),
        ("recipe.yaml", b"started: 2025-01-01\n", r"recipe\.yaml: holds a value that JSON has no word for"),
        ("plan.json", b'{"totals": {', r"plan\.json: not valid JSON"),
        ("plan.json", b"[1]", r"plan\.json: must be a mapping\n    got: list"),
        ("plan.json", b'{"totals": 3}', r"plan\.json: field 'totals'\n    got: 3"),
        ("environment.json", b'{"a": NaN}', r"environment\.json: holds a value that JSON has no word for"),
        ("levels.jsonl", b'{"level": 1, "split": "test"}', r"levels\.jsonl: ends in the middle of a line"),
        ("levels.jsonl", b'{"level"\n{"level": 1}\n', r"levels\.jsonl:1: not JSON lines"),
        ("levels.jsonl", b"\xff\n", r"levels\.jsonl:1: not JSON lines"),
        ("levels.jsonl", b'{"level": 9, "split": "test"}\n', r"levels\.jsonl:1: field 'level'\n    got: 9"),
        ("levels.jsonl", b'{"level": 1}\n', r"levels\.jsonl:1: field 'split'\n    got: nothing"),
        ("selection.jsonl", b"3\n", r"selection\.jsonl:1: must be a mapping"),
        ("metrics.jsonl", b'{"step": 1, "loss": NaN}\n', r"metrics\.jsonl:1: holds a value that JSON has no"),
        ("metrics.jsonl", b'{"step": 1}\n', r"metrics\.jsonl:1: field 'loss'"),
        (
            "metrics.jsonl",
            b'{"step": 1, "loss": 2, "lr": "x"}\n',
            r"metrics\.jsonl:1: field 'lr'\n    got: 'x'",
        ),
        ("eval/base/predictions.jsonl", b'{"id": 1}\n', r"base/predictions\.jsonl:1: field 'prompt'"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(
    run: Path, file: str, content: bytes, message: str
) -> None:
    (run / file).write_bytes(content)
    with pytest.raises(UserInputError, match=message):
        write_report(run)
    assert not (run / "report.html").exists() and not (run / "report.json").exists()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, 400))
def test_a_file_cut_at_any_byte_is_refused_or_loses_whole_rows_that_scores_miss(run: Path, cut: int) -> None:
    path = run / "eval" / "base" / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: cut * len(whole) // 401])
    with pytest.raises(UserInputError, match=r"predictions\.jsonl"):
        read_run(run)
    path.write_bytes(whole)


def test_a_run_killed_while_it_wrote_a_step_is_reported_without_that_step(run: Path, fake: Any) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    report = fake.report()
    assert report["training"]["num_steps"] == 4
    assert "4 of 5 planned steps are recorded: the run is not complete." in report["notes"]
