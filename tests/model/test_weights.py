"""The streamer of weights reads what was written, and changes several folders' weights stretch by stretch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftcore.errors import UserInputError
from sftcore.model import weights
from sftcore.model.weight_files import check_unchanged
from sftcore.model.weights import aligned, change_weights, model_folder, read_spans

COUNTS = {"steps": torch.arange(5)}  # no weights: they stay as they are
KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16),
    *(torch.uint8, torch.bool),
)


def write_folder(folder: Path, scale: float, *, rows: int = 3) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.sha256").write_text("of other weights")
    first = {"b": scale * torch.ones(rows, 4), "a": scale * torch.arange(10.0).bfloat16()}
    save_file(first | COUNTS, folder / "model-1.safetensors")
    save_file({"c": torch.full((), scale)}, folder / "model-2.safetensors")
    return folder


def test_tensors_of_every_kind_and_shape_are_read(tmp_path):
    torch.manual_seed(0)
    written = {str(kind): (torch.randn(3, 2) * 9).abs().to(kind) for kind in KINDS}
    written |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "wide": torch.randn(2, 3, 4)}
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spans = read_spans(tmp_path)
    assert spans.keys() == written.keys()
    for name, tensor in written.items():
        found = spans[name].tensor()
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("chunk", [4, 2**22])  # stretches that end inside tensors, and one for all
def test_the_mean_of_three_folders(tmp_path, monkeypatch, chunk):
    """Of the weights 1, 2 and 6 times the same, so 3 times it; in their own dtypes, in their own files."""
    monkeypatch.setattr(weights, "CHUNK", chunk)
    folders = [write_folder(tmp_path / str(scale), scale) for scale in (1.0, 2.0, 6.0)]
    seen = []

    def mean(name, parts):
        seen.append((name, len(parts[0])))
        return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)

    with model_folder(tmp_path / "mean", like=folders[0]) as folder:
        change_weights(aligned(folders), folder, mean, label="averaging")
    assert max(size for _, size in seen) <= chunk
    assert [name for name, _ in seen] == (["a"] * 3 + ["b"] * 3 + ["c"] if chunk == 4 else ["a", "b", "c"])
    written = write_folder(tmp_path / "written", 3.0)
    for file in ("model-1.safetensors", "model-2.safetensors"):
        assert (tmp_path / "mean" / file).read_bytes() == (written / file).read_bytes()
    assert torch.equal(load_file(tmp_path / "mean" / "model-1.safetensors")["steps"], COUNTS["steps"])
    check_unchanged(tmp_path / "mean")
    assert (tmp_path / "mean" / "weights.sha256").read_text().count("\n") == 3


def test_folders_of_other_shapes_are_named(tmp_path):
    folders = [write_folder(tmp_path / str(rows), 1.0, rows=rows) for rows in (3, 4, 5)]
    with pytest.raises(UserInputError, match=r"(?s)/3 and .*/5: 1 tensors are not in all folders.*got: b"):
        aligned(folders)


def test_what_fails_leaves_no_folder(tmp_path):
    like = write_folder(tmp_path / "like", 1.0)
    with pytest.raises(ZeroDivisionError), model_folder(tmp_path / "out", like=like) as folder:
        change_weights(aligned([like]), folder, lambda *_: 1 / 0, label="failing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x00" * 4, "it has 4 bytes and ends in its header"),
        (b"\x02" + b"\x00" * 7 + b"[]", "its header is damaged"),
        (b"\x02" + b"\x00" * 7 + b"{}more", "it has 14 bytes instead of 10"),
    ],
)
def test_files_that_are_not_whole_are_named(tmp_path, content, fault):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserInputError, match=f"no whole file of weights: {fault}"):
        read_spans(tmp_path)
