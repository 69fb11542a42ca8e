"""Odd values at the doors: YAML, paths, messages, names. Each ends with a value or one bounded message."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from sftcore.batching.schedule import Schedule
from sftcore.config import Recipe
from sftcore.display import inert, masked, shown, shown_value
from sftcore.errors import MAX_LETTERS, MAX_PROBLEMS, Problem, SftError, UserInputError
from sftcore.fsio import atomic_file
from sftcore.paths import file_fault, folder_fault
from sftcore.recipe import dump_recipe, load_recipe
from sftcore.settings import TeacherSettings
from sftcore.study.grid import StudySettings, expand
from sftcore.yaml_text import MAX_DEPTH, parse_yaml, read_yaml

SECRET = "hunter2"
TEACHER = {"base_url": f"https://me:{SECRET}@host:8000/v1?api_key={SECRET}", "model": "m"}


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/v1",
        f"a 'postgres://{SECRET}@host' b",
        f"https://h/v1?n=1&access_token={SECRET}&m=2#x",
        f"https://h/?X-Amz-Signature={SECRET}",
        f"https://u:p@{SECRET}@host",
        f"proxy http://u:{SECRET}@[::1]:80/ refused",
        "HF_TOKEN=hf_hunter2hunter2hunter2",
        "Authorization: Bearer hunter2hunter2",
    ],
)
def test_passwords_of_urls_are_masked(text):
    assert SECRET not in masked(text) and "***" in masked(text)
    assert SECRET not in str(UserInputError(Problem(what=text, where=text, got=text)))


def test_what_is_no_password_stays():
    for text in ("https://host/v1?page=2", "mail me@host", "a?b=c", "model: org/name", "no://x y@z"):
        assert masked(text) == text


def test_a_message_holds_nothing_that_a_terminal_obeys_and_is_bounded():
    odd = "\x1b[31m\x07\x00\u202e\ud800\u2028" + "x" * 10**4
    text = str(UserInputError(*[Problem(what=odd, where=f"a\nb{odd}", got=odd)] * 10_000))
    assert not set("\x1b\x07\x00\u202e\u2028") & set(text)
    assert len(text) < 3 * (MAX_PROBLEMS + 1) * (MAX_LETTERS + 100) and "... and 9960 more problems" in text
    text.encode()
    assert inert("北京\t a\n") == "北京\t a\n"


def test_values_that_python_can_not_write_are_shown():
    holds_itself: list = []
    for _ in range(100_000):
        holds_itself = [holds_itself]
    assert shown_value(10**5000) == "a whole number of 16610 bits"
    assert shown_value([10**5000]) == "a list" == shown_value(holds_itself)
    assert len(shown_value("x" * 10**6)) < 100 and len(shown("é" * 1000, 80)) <= 80


DEEP = MAX_DEPTH + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9" * 5000, "a whole number of 5,000 digits"),
        ("0x" + "f" * 5000, "a whole number of 5,002 digits"),
        ("[" * DEEP + "]" * DEEP, "nested over 30 levels"),
        ("{a: " * 5000, "nested over 30 levels"),
        ("- " * 5000 + "x", "nested over 30 levels"),
        ("&a [*a]", "stands inside itself"),
        ("a: &a {b: {c: *a}}", "stands inside itself"),
        ("a: 1\nb: 2026-13-45", "looks like a date or a number and is none.*, line 2: b: 2026-13-45"),
        ("!!python/object/apply:os.system [true]", "tags such as"),
        ("!!binary x", "tags such as"),
        ("{[1, 2]: 3}", "a key must be a name"),
        ("a: \0", "special characters"),
        ("{a: 1, a: 2}", "given twice"),
    ],
)
def test_odd_yaml_is_refused_in_few_words(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        parse_yaml(text)
    assert len(str(refused.value)) < 1000
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserInputError, match=r"odd\.yaml: not valid YAML"):
        read_yaml(tmp_path / "odd.yaml")


@pytest.mark.parametrize("shape", ["[{}]", "{{<<: [{}]}}", "{{k: [{}]}}"])
def test_aliases_that_multiply_are_counted_before_they_are_followed(shape):
    first = "{a: x, b: x, c: x}" if "<<" in shape else "[x, x, x]"
    lines = [f"b{i}: &b{i} " + shape.format(", ".join([f"*b{i - 1}"] * 10)) for i in range(1, 12)]
    with pytest.raises(ValueError, match="over 100,000 values"):
        parse_yaml("\n".join([f"b0: &b0 {first}", *lines]))
    few = "a: &a [1]\nb: [*a, *a]\nc: {<<: {d: *a}}"
    assert parse_yaml(few) == {"a": [1], "b": [[1], [1]], "c": {"d": [1]}}


def test_a_file_that_is_no_recipe_is_not_read_whole(tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UserInputError, match="over 1,048,576 bytes"):
        read_yaml(tmp_path / "big.yaml")


@pytest.fixture
def oddities(tmp_path, monkeypatch) -> Path:
    """Things with names that are no files."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("nowhere").symlink_to("absent")
    Path("circle").symlink_to("circle")
    Path("file").touch()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket")
    return tmp_path


ODD_FILES = {
    "pipe": "a pipe",
    "nowhere": "a link that leads nowhere",
    "circle": "symbolic links",
    "socket": "a socket",
    "/dev/zero": "a device",
    "a\0b": "null",
    "x" * 5000: "too long",
    "file/x": "[Nn]ot a directory",
}


@pytest.mark.usefixtures("oddities")
@pytest.mark.parametrize("path", [*ODD_FILES, "."])
def test_what_is_no_file_is_told_before_it_is_opened(path):
    import re

    assert re.search(ODD_FILES.get(path, "a folder"), file_fault(path))
    with pytest.raises(UserInputError):
        read_yaml(Path(path))
    if path in ("pipe", "socket", "/dev/zero", "."):
        with pytest.raises(UserInputError, match="can't be written to"), atomic_file(Path(path)):
            pass
    assert file_fault("file") == "" and Path("/dev/zero").is_char_device()


@pytest.mark.usefixtures("oddities")
@pytest.mark.parametrize("path", [*ODD_FILES, "file", "b\udcff", "/dev/null/x"])
def test_what_can_be_no_folder_is_told_before_it_is_made(path):
    assert folder_fault(Path(path))
    assert folder_fault(Path("new/deep")) == "" == folder_fault(Path()) and not Path("new").exists()


@pytest.mark.usefixtures("oddities")
@pytest.mark.parametrize("path", ["pipe", "nowhere", "socket", "/dev/zero", "p*pe", "*"])
def test_sources_are_files(tiny_recipe, oddities, path):
    recipe = tiny_recipe | {"data": {"train": [{"format": "facts", "path": path}]}}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserInputError, match=r"data\.train\.0\.path: "):
        load_recipe(Path("r.yaml"))


@pytest.mark.parametrize(
    "change",
    [
        *("train.epochs=100001", "batch.samples_per_step=99999999999999999999", "train.lr=1e400"),
        *("data.train.0.limit=" + "9" * 5000, "train.hang_seconds=1e300", "probe.temperature=1e-300"),
        *("model.path='a\\0b'", "run=" + "x" * 5000, "name=" + "x" * 300, "deepspeed=" + "x/" * 3000),
        *(
            "data.train.²=1",
            "data.train." + "9" * 5000 + "=1",
            "a." * 5000 + "b=1",
            "data.train.0.path=/dev/zero",
        ),
        *("seed=.nan", "train.betas=[.inf, 1]", "model=" + "[" * 5000, "evaluate.max_new_tokens=10000000"),
        *(
            f"matching.teacher={{model: m, base_url: '{url}'}}"
            for url in ("host", "ftp://h", "http://h:x", "http://")
        ),
    ],
)
def test_odd_values_are_refused_in_a_bounded_message(tiny_recipe, change):
    Path("r.yaml").write_text(yaml.safe_dump(tiny_recipe))
    with pytest.raises(UserInputError) as refused:
        load_recipe(Path("r.yaml"), [change])
    assert 10 < len(str(refused.value)) < 6000
    assert {file.name for file in Path().iterdir()} == {"r.yaml", "train.jsonl", "test.jsonl"}


def test_the_password_of_a_teacher_is_in_no_copy_of_the_recipe(tiny_recipe):
    recipe = Recipe.model_validate(tiny_recipe | {"matching": {"teacher": TEACHER}})
    assert recipe.matching.teacher.base_url == TEACHER["base_url"]  # what is asked
    copies = (
        dump_recipe(recipe),
        recipe.model_dump_json(),
        str(recipe.model_dump()),
        str(recipe.model_dump(mode="json")),
    )
    assert all(SECRET not in copy and "https://***@host:8000/v1?api_key=***" in copy for copy in copies)
    with pytest.raises(ValueError) as refused:
        TeacherSettings.model_validate(TEACHER | {"base_url": f"ftp://me:{SECRET}@host"})
    assert "address of a server" in str(refused.value)


def test_a_grid_of_a_million_runs_is_counted_not_made(tmp_path):
    settings = StudySettings(base="absent.yaml", grid={"seed": list(range(1000)), "train.lr": [1.0] * 1000})
    with pytest.raises(UserInputError, match="1,000,000 runs"):
        expand(settings, tmp_path)
    with pytest.raises(UserInputError, match="1,000,000,000 runs"):
        expand(StudySettings(base="absent.yaml", draws=10**9), tmp_path)


def test_a_study_whose_base_is_itself_is_no_recipe(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("base: study.yaml\ngrid: {seed: [1]}\n")
    with pytest.raises(UserInputError, match="base: unknown key"):
        expand(StudySettings(base=str(path), grid={"seed": [1, 2]}), tmp_path)


def test_a_plan_of_a_hundred_thousand_epochs_has_all_its_steps():
    schedule = Schedule(
        lengths=[3, 4], num_trained=[1, 1], capacity=8, seed=0, epochs=100_000, world=1, samples_per_step=1
    )
    assert schedule.num_steps == 200_000 and schedule.step(199_999).epoch == 99_999
    assert len(schedule.largest_pack) == 1


def test_an_error_without_problems_is_empty():
    assert str(SftError()) == ""
