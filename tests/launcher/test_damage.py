"""Every file of a finished run, damaged in every way: refused by name or made again, never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from launcher_commands import save, sftcore
from launching import weights_hash
from tiny import write_lines

from sftcore.errors import SftError, UserInputError
from sftcore.fsio import read_json, read_jsonl, write_json
from sftcore.knowledge.level_files import read_levels
from sftcore.launcher.cli import app
from sftcore.launcher.terminal import explained
from sftcore.model.weight_files import check_unchanged, check_weight_files, write_checksums
from sftcore.recipe import load_recipe
from sftcore.settings import CHECKSUMS
from sftcore.stages.evaluate import evaluate
from sftcore.stages.whole_run import run_whole

HOWS = ("empty", "cut", "flipped", "garbage", "folder", "link")
COMMANDS = ("train", "evaluate", "report")
SPARED = (".lock",)  # holds a lock, not data
RUN = Path("runs/tiny")


def damage(file: Path, how: str, random_: random.Random) -> None:
    content = file.read_bytes()
    file.unlink()
    match how:
        case "empty":
            file.touch()
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "flipped":
            place = random_.randrange(max(1, len(content)))
            flipped = bytes([content[place] ^ (1 << random_.randrange(8))]) if content else b"\x00"
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
        case "garbage":
            file.write_text('[{"a": 1}, 3]\n')
        case "folder":
            file.mkdir()
        case "link":
            file.symlink_to("nowhere")


def run_in_process(*arguments: str) -> tuple[int, str]:
    """The exit code and the message of a command, as `sftcore` gives them, without another process."""
    try:
        with explained():
            app(list(arguments), standalone_mode=False)
    except SftError as error:
        return error.exit_code, str(error)
    return 0, ""


@pytest.fixture
def finished(tiny_recipe) -> Path:
    """A run that was selected by level, trained with validation, evaluated and reported."""
    facts = [{"id": f"v{i}", "relation": "P19", "subject": f"Val{i}", "answers": ["Rome"]} for i in range(4)]
    write_lines(Path("valid.jsonl"), facts)
    valid = [{"format": "facts", "path": "valid.jsonl"}]
    data = {**tiny_recipe["data"], "valid": valid}
    probe = {"templates": 2, "samples": 3, "max_new_tokens": 4}
    select = {"levels": [0, 1, 2, 3, 4], "n": 12, "balance": "none"}
    path = Path(save(tiny_recipe, data=data, probe=probe, select=select))
    run_whole(load_recipe(path))
    return path


@pytest.mark.slow
def test_every_file_damaged_in_every_way(finished, monkeypatch):
    """Each file x each kind of damage x three commands, on a copy; seeded, so that a failure comes again."""
    monkeypatch.setenv("COLUMNS", "400")
    shutil.copytree(RUN, "good", symlinks=True)
    files = sorted(
        str(f.relative_to(RUN))
        for f in RUN.rglob("*")
        if f.is_file() and f.name not in SPARED and not f.match("ds/*") and f.suffix != ".png"
    )
    assert {"recipe.yaml", "metrics.jsonl", "model/model.safetensors", "eval/tuned/scores.json"} <= set(files)
    codes: Counter[int] = Counter()
    wrong = []
    for number, name in enumerate(files):
        for how in HOWS:
            command = COMMANDS[(number + HOWS.index(how)) % len(COMMANDS)]
            shutil.rmtree(RUN)
            shutil.copytree("good", RUN, symlinks=True)
            damage(RUN / name, how, random.Random(f"{name} {how}"))
            line = [command, str(RUN) if command == "report" else str(finished)]
            try:
                code, said = run_in_process(*line)
            except Exception as error:  # what a user would see as a traceback
                wrong.append((name, how, command, repr(error)[:300]))
                continue
            codes[code] += 1
            if code not in (0, 2, 3) or "Traceback" in said:
                wrong.append((name, how, command, code, said[-300:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert codes[0] > 20 and codes[2] > 20, codes


@pytest.mark.slow
def test_every_file_of_an_adapter_damaged_in_every_way(tiny_recipe):
    path = Path(save(tiny_recipe, adapter={"kind": "lora", "r": 2}))
    run_whole(load_recipe(path))
    scores = (RUN / "eval/tuned/scores.json").read_bytes()
    shutil.copytree(RUN / "adapter", "good")
    codes: Counter[int] = Counter()
    for name in sorted(file.name for file in Path("good").iterdir()):
        for how in HOWS:
            shutil.rmtree(RUN / "adapter")
            shutil.copytree("good", RUN / "adapter")
            damage(RUN / "adapter" / name, how, random.Random(f"{name} {how}"))
            for command in (["evaluate", str(path)], ["export", str(RUN), "--to", "out"]):
                code, said = run_in_process(*command)
                assert code == 2 or name == "README.md", (name, how, command, said)
                codes[code] += 1
            assert (RUN / "eval/tuned/scores.json").read_bytes() == scores, "the old scores stay"
            shutil.rmtree("out", ignore_errors=True)
    assert codes[2] > 50


def test_damaged_weights_are_named_whichever_they_are(finished, tiny_recipe):
    base = Path("base")
    shutil.copytree(tiny_recipe["model"]["path"], base)
    save(tiny_recipe, model={**tiny_recipe["model"], "path": "base"}, name="other")
    weights = (base / "model.safetensors").read_bytes()
    for content in (b"", weights[:6], weights[:100], weights[:-1], weights + b"x", b"[]" * 5000):
        (base / "model.safetensors").write_bytes(content)
        for command in ("train", "evaluate", "probe"):
            done = sftcore(command, "recipe.yaml", "--run", "new")
            assert done.returncode == 2 and "base/model.safetensors" in done.stderr, (
                len(content),
                done.stderr,
            )
    (base / "model.safetensors").unlink()
    for content in (b"", b"PK\x03\x04 half of a zip file"):
        (base / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserInputError, match=r"pytorch_model\.bin: no whole file of weights"):
            check_weight_files(base)
    index = base / "model.safetensors.index.json"
    for content in (b"", b"[]", b'{"weight_map": {"a": "gone.safetensors"}}'):
        (base / "pytorch_model.bin").unlink(missing_ok=True)
        index.write_bytes(content)
        with pytest.raises(UserInputError, match=r"index\.json: no whole file of weights"):
            check_weight_files(base)


def test_weights_that_changed_are_told_and_old_scores_stay(finished):
    recipe = load_recipe(finished)
    result = recipe.result_folder
    scores = (RUN / "eval/tuned/scores.json").read_bytes()
    assert "model.safetensors" in (result / CHECKSUMS).read_text()
    file = result / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    for command in (["evaluate", str(finished)], ["export", str(RUN), "--to", "copy"]):
        done = sftcore(*command)
        assert done.returncode == 2 and "weights have changed since they were written" in done.stderr
        assert "model.safetensors is another" in done.stderr
    assert (RUN / "eval/tuned/scores.json").read_bytes() == scores and not Path("copy").exists()
    (result / CHECKSUMS).write_text("half a line")
    with pytest.raises(UserInputError, match="damaged checksums"):
        check_unchanged(result)
    (result / CHECKSUMS).unlink()
    assert evaluate(recipe)["tuned"]["n"] == 8, "the change was meant"
    write_checksums(result)
    (result / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserInputError, match=r"chat_template\.jinja is new"):
        check_unchanged(result)


@pytest.mark.parametrize("how", ["cut", "row gone", "flipped", "other shape"])
def test_damaged_levels_are_refused_by_name_and_probed_again(finished, how):
    path = RUN / "levels.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    match how:
        case "cut":
            path.write_bytes(good[:-9])
        case "row gone":
            path.write_bytes(b"".join(lines[:-1]))
        case "flipped":
            path.write_bytes(good.replace(b'"hits": 0', b'"hits": 1', 1))
        case _:
            path.write_bytes(b"".join([b'{"id": 3, "hits": "2"}\n', *lines[1:]]))
    manifest = read_json(RUN / "levels.manifest.json")
    with pytest.raises(UserInputError, match=r"levels\.jsonl|disagrees with itself"):
        read_levels(RUN, model_fingerprint=manifest["model_fingerprint"], dtype=manifest["dtype"])
    done = sftcore("probe", str(finished))
    assert done.returncode == 0 and "probing again" in done.stderr, done.stderr
    assert path.read_bytes() == good


def test_damaged_predictions_are_made_again(finished):
    path, scores = RUN / "eval/base/predictions.jsonl", RUN / "eval/base/scores.json"
    good = path.read_bytes(), scores.read_bytes()
    for file in (path, scores):
        content = file.read_bytes()
        file.write_bytes(content[:-30])
        assert evaluate(load_recipe(finished))["base"]["n"] == 8
        assert (path.read_bytes(), scores.read_bytes()) == good
    file = RUN / "eval/base/manifest.json"
    write_json(file, [3])
    assert evaluate(load_recipe(finished))["base"]["n"] == 8
    assert len(read_jsonl(path)) == 8 and "files" in read_json(file)


def test_damaged_attempts_are_put_aside(tmp_path):
    from sftcore.launcher.attempts import begin_attempt

    environment = {"SLURM_JOB_ID": "7", "SFTCORE_RETRIES": "1"}
    path = tmp_path / "attempts.jsonl"
    begin_attempt(tmp_path, environment)
    with open(path, "a") as handle:
        handle.write('{"job": "7", "st')
    begin_attempt(tmp_path, environment)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 0]
    path.write_text("x\n" + path.read_text())
    begin_attempt(tmp_path, environment)
    assert len(read_jsonl(path)) == 1 and (tmp_path / "damaged.attempts.jsonl").is_file()


def test_a_run_whose_weights_are_damaged_is_not_called_finished(finished):
    before = weights_hash("tiny")
    file = RUN / "model/model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    for command in ("train", "run"):
        done = sftcore(command, str(finished))
        assert done.returncode == 2 and "model/model.safetensors: no whole file of weights" in done.stderr
    file.write_bytes(good)
    assert weights_hash("tiny") == before and sftcore("run", str(finished)).returncode == 0
