"""Checkpoints: state -> a folder that is whole or not there, and back.

In: an engine and the number of steps done. Out: RUN/checkpoints/step-000050/{ds, state.json, MANIFEST.json,
COMMITTED}.
Invariant: COMMITTED is written last, after a rename of a flushed folder whose files are listed with size
and checksum; what does not verify is skipped with the reason, and the newest that verifies is never
deleted. Loading runs no code that a file names.
Trade-off: each rank hashes its share of the files (xxh3, several GB/s), so verifying a save costs less than
writing it; every resume reads all files once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash

from sftcore import dist
from sftcore.amounts import counted
from sftcore.errors import MissingEnvironmentError, Problem, SftError, UserInputError
from sftcore.fsio import (
    DAMAGED,
    atomic_file,
    disk_errors_explained,
    read_object,
    sync_entry,
    sync_folder,
    write_json,
)
from sftcore.train.engine import Engine  # first: it tells DeepSpeed what it runs on

from deepspeed.checkpoint import ds_to_universal  # isort: skip
from deepspeed.runtime.fp16.loss_scaler import LossScaler  # isort: skip
from deepspeed.runtime.zero.config import ZeroStageEnum  # isort: skip
from deepspeed.utils.tensor_fragment import fragment_address  # isort: skip

log = logging.getLogger(__name__)
COMMITTED, MANIFEST, STATE = "COMMITTED", "MANIFEST.json", "state.json"
STEP = re.compile(r"step-\d{6,15}")
STATE_CLASSES = (LossScaler, ZeroStageEnum, fragment_address)  # plain records in DeepSpeed 0.19.8's files
ONLY_WEIGHTS, ALL_OBJECTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands; all else follows from the recipe.

    Args:
        step: optimizer steps done.
        epoch: epoch of the last step done, 0-based.
        plan_fingerprint: of the schedule that the steps came from.
        world_size: ranks that saved.
        num_threads: torch's CPU threads (another number changes the last bits on a CPU).
        plan_settings: what the plan follows from, by recipe key; names what differs when it does.
        dtype: in which the model was held; empty in checkpoints of earlier versions.
        num_evaluations: rows of valid.jsonl then; 0 in checkpoints of earlier versions.
    """

    step: int
    epoch: int
    plan_fingerprint: str
    world_size: int
    num_threads: int
    plan_settings: dict[str, Any]
    dtype: str = ""
    num_evaluations: int = 0


LATER = ("dtype", "num_evaluations")  # keys that earlier versions did not write


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step-000050."""
    return run / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(run: Path, engine: Engine, state: TrainState, *, keep: int) -> Path:
    """Save collectively (all ranks call it), commit, and prune to the newest `keep`.

    Raises:
        MissingEnvironmentError: the disk is full; earlier checkpoints are untouched.
    """
    final = checkpoint_folder(run, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    with disk_errors_explained(run), _removed_on_failure(temporary):
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        with _torch_write_errors_explained(run):
            engine.save(temporary)
        if dist.rank() == 0:
            write_json(temporary / STATE, asdict(state))
        dist.barrier()
        manifest = _merged_manifest(temporary)
        if dist.rank() == 0:
            write_json(temporary / MANIFEST, manifest)
            _commit(temporary, final)
            prune(run, keep=keep)
    dist.barrier()
    return final


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    """A save that failed leaves nothing: its part would keep a full disk full."""
    try:
        yield
    except (OSError, SftError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _torch_write_errors_explained(run: Path) -> Iterator[None]:
    """torch reports a write that failed (disk full, quota) as a RuntimeError of its zip writer.

    Or the folder is gone: another rank failed to write its part, and took it away.
    """
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:
        words = ("PytorchStreamWriter", "inline_container", "Parent directory", "No such file")
        if not any(word in str(error) for word in words):
            raise
        raise MissingEnvironmentError(
            Problem(
                what=f"can't write a checkpoint: {str(error).splitlines()[0][:200]}",
                where=str(run),
                got=f"{shutil.disk_usage(run).free:,} bytes free",
                remedy="free space there, or point --run to another disk; the earlier checkpoint is intact",
            )
        ) from error


def _merged_manifest(folder: Path) -> dict[str, list[int | str]]:
    """{file: [bytes, checksum]} of all files; each rank reads every world-th of them."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    own = {
        str(f.relative_to(folder)): [f.stat().st_size, checksum(f)]
        for f in files[dist.rank() :: dist.world_size()]
    }
    merged: dict[str, list[int | str]] = {}
    for part in dist.gather_objects(own):
        merged.update(part)
    return merged


def _commit(temporary: Path, final: Path) -> None:
    sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_entry(final.parent)
    with atomic_file(final / COMMITTED) as handle:
        handle.write(f"{checksum(final / MANIFEST)}\n")
    sync_entry(final)


def checksum(file: Path) -> str:
    """xxh3 of a file, 128 bits as hex; guards against torn writes, not against malice."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by their number of steps."""
    folders = (path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name))
    return sorted((path for path in folders if path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """Steps done, as a checkpoint folder's name says.

    >>> step_of(Path("checkpoints/step-1000000")) > step_of(Path("checkpoints/step-999999"))
    True
    """
    return int(folder.name.removeprefix("step-"))


def prune(run: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and leftovers of interrupted saves."""
    committed = [folder for folder in checkpoints_of(run) if (folder / COMMITTED).exists()]
    for folder in committed[:-keep]:
        (folder / COMMITTED).unlink()
        shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def why_not_usable(folder: Path) -> str:
    """Empty if `folder` is a whole checkpoint, else the reason why it is not, whatever that is."""
    try:
        return _why_not_whole(folder)
    except UserInputError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or folder} can't be read: {error.strerror}"


def _why_not_whole(folder: Path) -> str:
    if not (folder / COMMITTED).exists():
        return "the save was interrupted (no COMMITTED)"
    manifest = read_object(folder / MANIFEST, STATE)
    vouched = (folder / COMMITTED).read_bytes().decode("ascii", "replace").strip()
    if vouched and vouched != checksum(folder / MANIFEST):
        return f"{MANIFEST} is not the one that was committed"
    if not any(name.startswith("ds/") for name in manifest):
        return f"{MANIFEST} lists no state of DeepSpeed's"
    for name, entry in manifest.items():
        if reason := _why_not_the_file(folder, name, entry):
            return reason
    read_state(folder)
    return ""


def _why_not_the_file(folder: Path, name: str, entry: Any) -> str:
    match entry:
        case [int(size), str(digest)] if ".." not in Path(name).parts and not Path(name).is_absolute():
            file = folder / name
        case _:
            return f"{MANIFEST} holds {name[:80]!r}: {str(entry)[:80]}"
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != size:
        return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return f"{name} has a wrong checksum" if checksum(file) != digest else ""


def newest_usable(run: Path, *, at_most: int | None = None) -> Path | None:
    """The newest checkpoint of a run that verifies; each one skipped is warned of, with the reason.

    Args:
        at_most: only those of so many steps or fewer.
    """
    for folder in reversed(checkpoints_of(run)):
        if at_most is not None and step_of(folder) > at_most:
            continue
        reason = why_not_usable(folder)
        if not reason:
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
    return None


def agreed_checkpoint(run: Path, own: Path | None) -> Path | None:
    """The newest checkpoint that all ranks can read, from the one that each found; all ranks call it.

    Their machines see one disk, but perhaps not each file of it.
    """
    while len(found := set(dist.gather_objects(step_of(own) if own else 0))) > 1:
        log.warning("ranks can read checkpoints of %s steps: going back to the oldest of these", found)
        own = newest_usable(run, at_most=min(found))
    return own


def read_state(folder: Path) -> TrainState:
    """The state that a checkpoint was saved with.

    Raises:
        UserInputError: the file is not as this version writes it.
    """
    names = {field.name for field in fields(TrainState)}
    values: dict[str, Any] = {"dtype": "", "num_evaluations": 0}
    values |= read_object(folder / STATE, *sorted(names - set(LATER)))
    numbers = [values[name] for name in ("step", "epoch", "world_size", "num_threads", "num_evaluations")]
    is_state = all(type(number) is int and number >= 0 for number in numbers)
    is_text = isinstance(values["dtype"], str)
    if not (is_state and is_text and isinstance(values["plan_settings"], dict) and values.keys() == names):
        raise UserInputError(Problem(what="no state of a run", where=str(folder / STATE), remedy=DAMAGED))
    return TrainState(**values)


@contextmanager
def only_tensors_unpickled(folder: Path) -> Iterator[None]:
    """Within it, whatever loads a file of torch's gets tensors, plain values and `STATE_CLASSES` from it.

    A pickle can name any function to call. DeepSpeed asks torch to load whole objects; this setting of torch
    overrules the call.

    Raises:
        UserInputError: a file asks for more.
    """
    before = {name: os.environ.pop(name, None) for name in (ONLY_WEIGHTS, ALL_OBJECTS)}
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        with torch.serialization.safe_globals(list(STATE_CLASSES)):
            yield
    except pickle.UnpicklingError as error:
        raise UserInputError(
            Problem(
                what="a file of this checkpoint holds more than numbers: loading it could run any code",
                where=str(folder),
                got=next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")[:200],
                remedy="resume from a checkpoint that sftcore saved",
            )
        ) from error
    finally:
        del os.environ[ONLY_WEIGHTS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def for_this_world(folder: Path, state: TrainState, *, stage: int) -> Iterator[Path]:
    """A checkpoint folder that this number of ranks can load: itself, or converted; all ranks enter.

    DeepSpeed's sharded optimizer state loads at the world size it was saved with; its universal form (one
    file per parameter and state, in float32, next to the checkpoint while it is loaded) loads at any. At
    stage 0 every rank has all of it.
    """
    if state.world_size == dist.world_size() or stage == 0:
        yield folder
        return
    log.info("converting the checkpoint of %s for %d", counted(state.world_size, "rank"), dist.world_size())
    converted = folder.with_name(f".{folder.name}.universal.tmp")
    with disk_errors_explained(folder):
        if dist.rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)
            with _torch_write_errors_explained(folder):
                _convert(folder / "ds", converted / "ds")
        dist.barrier()
        yield converted
        dist.barrier()
        if dist.rank() == 0:
            shutil.rmtree(converted)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's ds_to_universal in this process; what it prints is kept off the terminal."""
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
