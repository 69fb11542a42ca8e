"""Rationales from a real server, killed and started again midway, and from a model in this process."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from launching import BIN, ENVIRONMENT
from packaged import packaged_model
from tiny_tokenizers import CHATML, build_bpe

from sftcore.data.contents import Pair
from sftcore.data.records import Record
from sftcore.errors import MissingEnvironmentError
from sftcore.fsio import read_json, read_jsonl
from sftcore.generate.api import Reply
from sftcore.generate.server import Failure
from sftcore.recipe import load_recipe
from sftcore.settings import MatchingSettings, TeacherSettings
from sftcore.stages.rationales import _as_asked, keep_agreeing, summarise, warn_of_failures, write_rationales

NUM_PAIRS = 8


def teacher_recipe(folder: Path, **teacher) -> Path:
    recipe = {
        "name": "asked",
        "model": {"path": str(folder)},
        "task": "matching",
        "data": {"train": [{"format": "pairs", "path": "assets:pairs/plain.tsv", "limit": NUM_PAIRS}]},
        "batch": {"samples_per_step": 4},
        "matching": {"teacher": {"max_new_tokens": 12} | teacher},
    }
    path = Path("asked.yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_password_of_a_server_is_in_no_file(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "http://me:hunter2@127.0.0.1:9/v1?api_key=hunter2"  # nobody listens there
    path = teacher_recipe(tiny_model_folder, base_url=address, model="m", max_retries=0, timeout_seconds=5)
    recipe = load_recipe(path)
    path.unlink()  # the user's own copy
    with suppress(MissingEnvironmentError):
        write_rationales(recipe)
    texts = [file.read_text(errors="replace") for file in Path("runs").rglob("*") if file.is_file()]
    assert any("http://***@127.0.0.1:9/v1?api_key=***" in text for text in texts)
    assert not any("hunter2" in text for text in texts)


def test_what_agrees_is_kept_and_all_is_counted():
    settings = MatchingSettings()
    pair = {"a": "几点开门", "b": "何时开门"}
    said = ["都问开门时间。\n结论：相同", "时间不同。\n结论：不同", "相同", "结论：相同", None]
    where = {"split": "train", "file": "f"}
    records = [Record(id=f"r{i}", row=i, content=Pair(**pair, label=1), **where) for i in range(len(said))]
    replies = {
        r.id: Failure(why="x") if text is None else Reply(text=text, num_input_tokens=10, num_output_tokens=4)
        for r, text in zip(records, said, strict=True)
    }
    kept, counts = keep_agreeing(records, replies, settings)
    assert kept == [
        {
            "id": "r0",
            "sentence1": "几点开门",
            "sentence2": "何时开门",
            "label": 1,
            "rationale": "都问开门时间。",
        }
    ]
    assert counts == {"kept": 1, "disagreeing": 1, "unparsable": 2, "failed": 1}
    prices = TeacherSettings(model="m", input_price=2.0, output_price=10.0)
    summary = summarise(counts, replies, prices)
    assert summary["failed_by_reason"] == {"x": 1}
    assert summary["yield"] == 0.2 and summary["num_pairs"] == 5
    assert summary["cost"] == pytest.approx((40 * 2 + 16 * 10) / 1e6)
    assert summary["arm"] == "not run: fewer than 100 kept"


def test_why_pairs_failed_is_counted_and_told_in_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sftcore"), "propagate", True)
    whys = ["InternalServerError"] * 2 + ["no whole reply in 60 s"]
    replies = {str(i): Failure(why=why) for i, why in enumerate(whys)} | {"3": Reply(text="结论：相同")}
    summary = summarise(Counter(failed=3, unparsable=1), replies, TeacherSettings(model="m"))
    assert summary["failed_by_reason"] == {"InternalServerError": 2, "no whole reply in 60 s": 1}
    warn_of_failures(summary)
    (line,) = caplog.messages
    assert line.startswith("3 of 4 pairs failed: InternalServerError 2, no whole reply in 60 s 1;")
    warn_of_failures(summarise(Counter(kept=1), {}, TeacherSettings(model="m")))
    assert len(caplog.messages) == 1


def test_a_base_model_is_asked_as_the_prompt_stands_without_an_appended_eos():
    tokenizer = build_bpe(bos=True, eos=True)
    found = _as_asked(tokenizer, ["Where is Paris?", "Paris"])
    assert found == [tokenizer(text)["input_ids"][:-1] for text in ("Where is Paris?", "Paris")]
    tokenizer.chat_template = CHATML
    (asked,) = _as_asked(tokenizer, ["Paris"])
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n")


def test_the_local_model_is_asked_once(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(teacher_recipe(tiny_model_folder, backend="local"))
    first = write_rationales(recipe)
    assert first["num_pairs"] == first["unparsable"] == NUM_PAIRS, "a random model concludes nothing"
    cache = Path("runs/asked/teacher.jsonl")
    assert len(read_jsonl(cache)) == NUM_PAIRS and first["num_output_tokens"] > 0
    content = cache.read_bytes()
    assert write_rationales(recipe) == first and cache.read_bytes() == content
    assert read_json(Path("runs/asked/rationales.jsonl.summary.json"))["unparsable"] == NUM_PAIRS


def test_a_summary_that_fails_leaves_no_pairs_file(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr("sftcore.stages.rationales.summarise", fail)
    with pytest.raises(RuntimeError):
        write_rationales(load_recipe(teacher_recipe(tiny_model_folder, backend="local")))
    assert not Path("runs/asked/rationales.jsonl").exists()


def test_only_drawn_pairs_are_asked_of_and_their_number_is_told_first(
    tiny_model_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("sftcore"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sftcore")
    path = teacher_recipe(tiny_model_folder, backend="local")
    recipe = load_recipe(path, ["select={n: 4, balance: label, draw: 1}"])
    assert write_rationales(recipe)["num_pairs"] == 4
    assert len(read_jsonl(Path("runs/asked/teacher.jsonl"))) == 4
    assert "4 prompts to ask" in caplog.text


@contextmanager
def transformers_serve(model: Path, port: int):
    """A real OpenAI-compatible server; killed at the end of the block."""
    command = [str(BIN / "transformers"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_real_server_killed_and_started_again_midway(tmp_path, monkeypatch):
    model = packaged_model("smollm2-135m")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = teacher_recipe(
        model,
        model=str(model),
        base_url=f"http://127.0.0.1:{port}/v1",
        concurrency=2,
        timeout_seconds=300,
        max_retries=40,
    )
    cache = Path("runs/asked/teacher.jsonl")
    with transformers_serve(model, port):
        command = [str(BIN / "sftcore"), "rationales", str(path)]
        asking = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while not (cache.is_file() and len(read_jsonl(cache)) >= 2):
            assert asking.poll() is None, asking.communicate()
            time.sleep(0.05)
    num_before = len(read_jsonl(cache))
    assert num_before < NUM_PAIRS and asking.poll() is None, "killed in the middle"
    with transformers_serve(model, port):
        try:
            out, err = asking.communicate(timeout=500)
        finally:
            asking.kill()
    assert asking.returncode == 0, err[-3000:]
    summary = read_json(Path("runs/asked/rationales.jsonl.summary.json"))
    counts = {key: summary[key] for key in ("kept", "disagreeing", "unparsable", "failed")}
    assert sum(counts.values()) == summary["num_pairs"] == NUM_PAIRS and counts["failed"] == 0
    replies = read_jsonl(cache)
    assert len(replies) == len({row["key"] for row in replies}) == NUM_PAIRS
    assert summary["num_output_tokens"] == sum(row["num_output_tokens"] for row in replies) > NUM_PAIRS
    assert f" of {NUM_PAIRS} pairs kept (" in out
