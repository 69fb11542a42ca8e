"""Checkpoints: state -> a folder that is whole or not there, and back.

In: an engine and the number of steps done. Out: RUN/checkpoints/step-000050/{ds, state.json, MANIFEST.json,
COMMITTED}.
Invariant: COMMITTED is written last, after a rename of a flushed folder whose files are listed with size
and checksum; what does not verify is skipped with the reason, and the newest that verifies is never
deleted.
Trade-off: each rank hashes its share of the files (xxh3, several GB/s), so verifying a save costs less than
writing it; every resume reads all files once.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash

from sftcore import dist
from sftcore.errors import Problem, UserInputError
from sftcore.fsio import atomic_file, disk_errors_explained, read_json, sync_entry, sync_folder, write_json
from sftcore.train.engine import Engine

log = logging.getLogger(__name__)
COMMITTED, MANIFEST, STATE = "COMMITTED", "MANIFEST.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run stands; all else follows from the recipe.

    Args:
        step: optimizer steps done.
        epoch: epoch of the last step done, 0-based.
        plan_fingerprint: of the schedule that the steps came from.
        world_size: ranks that saved.
        num_threads: torch's CPU threads (another number changes the last bits on a CPU).
    """

    step: int
    epoch: int
    plan_fingerprint: str
    world_size: int
    num_threads: int


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
    with disk_errors_explained(run):
        if dist.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
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
        handle.write("")
    sync_entry(final)


def checksum(file: Path) -> str:
    """xxh3 of a file, 128 bits as hex; guards against torn writes, not against malice."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def prune(run: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and leftovers of interrupted saves."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    committed = [f for f in folders if (f / COMMITTED).exists()]
    for folder in committed[:-keep]:
        (folder / COMMITTED).unlink()
        shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def why_not_usable(folder: Path) -> str:
    """Empty if `folder` is a whole checkpoint, else the reason why it is not."""
    if not (folder / COMMITTED).exists():
        return "the save was interrupted (no COMMITTED)"
    try:
        manifest = read_json(folder / MANIFEST)
    except UserInputError as error:
        return f"no readable {MANIFEST}: {error}"
    for name, (size, digest) in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if checksum(file) != digest:
            return f"{name} has a wrong checksum"
    return ""


def newest_usable(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; each one skipped is warned of, with the reason."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        reason = why_not_usable(folder)
        if not reason:
            return folder
        log.warning("skipping checkpoint %s: %s", folder, reason)
    return None


def read_state(folder: Path) -> TrainState:
    """The state that a checkpoint was saved with."""
    return TrainState(**read_json(folder / STATE))


def check_resumable(folder: Path, state: TrainState, *, plan_fingerprint: str) -> None:
    """Refuse a checkpoint of another plan or another world size; warn of another thread count.

    Raises:
        UserInputError: this run can't go on from that checkpoint.
    """
    if state.plan_fingerprint != plan_fingerprint:
        raise UserInputError(
            Problem(
                what="this checkpoint belongs to another plan (data, seed, epochs or batch settings differ)",
                where=str(folder),
                remedy="use the recipe it was made with, or another run folder (--run DIR)",
            )
        )
    if state.world_size != dist.world_size():
        raise UserInputError(
            Problem(
                what="this checkpoint was saved by another number of ranks",
                where=str(folder),
                got=str(dist.world_size()),
                allowed=str(state.world_size),
                remedy=f"start {state.world_size} ranks, or train anew in another run folder",
            )
        )
    if state.num_threads != torch.get_num_threads():
        log.warning(
            "resuming with %d threads instead of %d: results may differ in the last bits",
            torch.get_num_threads(),
            state.num_threads,
        )
