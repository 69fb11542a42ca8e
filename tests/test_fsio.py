"""Files are whole or absent: after errors, a full disk, a crash in the middle, two writers."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys

import pytest

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.fsio import (
    append_jsonl,
    atomic_file,
    atomic_folder,
    fingerprint_of,
    folder_lock,
    open_binary,
    read_json,
    read_jsonl,
    sha256_of_file,
    write_json,
    write_jsonl,
)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError, match="stop"), atomic_file(path) as handle:
        handle.write("half")
        raise RuntimeError("stop")
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_in_a_folder_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("1")
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("2")
        raise RuntimeError("stop")
    assert (tmp_path / "f" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["f"]
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "y").write_text("3")
    assert os.listdir(tmp_path / "f") == ["y"]


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full")
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(MissingEnvironmentError, match="(?s)No space left.*free space there") as caught:
        with atomic_file(path):
            with open("/dev/full", "w") as full:
                full.write("x" * 100_000)
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_other_operating_system_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a"):
        open(tmp_path / "absent" / "b")  # noqa: SIM115


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == []


def test_lines_come_back_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, [{"a": "é"}, {"a": 2}]) == 2
    append_jsonl(path, {"a": 3})
    with open(path, "a") as handle:
        handle.write('{"a": 4')
    assert read_jsonl(path, appended=True) == [{"a": "é"}, {"a": 2}, {"a": 3}]
    with pytest.raises(UserInputError, match=r"a\.jsonl: ends in the middle of a line"):
        read_jsonl(path)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("{", "not valid JSON")])
def test_unreadable_json_is_the_users_input(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserInputError, match=message):
        read_json(path)


def test_gzip_by_name(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "a.txt").write_bytes(b"hello")
    for name in ("a.gz", "a.txt"):
        with open_binary(tmp_path / name) as handle:
            assert handle.read() == b"hello"


def test_fingerprints_depend_on_content_not_on_order_of_keys(tmp_path):
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    (tmp_path / "a").write_bytes(b"")
    assert sha256_of_file(tmp_path / "a").startswith("e3b0c442")


HOLD = """
import sys, time
from pathlib import Path
from sftcore.fsio import folder_lock
with folder_lock(Path(sys.argv[1]), purpose="training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserInputError, match=f"in use for probing by process {holder.pid}"):
        with folder_lock(tmp_path, purpose="probing"):
            pass
    holder.kill()
    holder.communicate()
    with folder_lock(tmp_path, purpose="probing"):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()}")
