"""Work that several jobs share: who does what, what each leaves, and how it is put together.

In: batches or files to make, a job's number and how many jobs there are. Out: a folder a job (shards/i-of-N),
in it a file that grows by a line a batch, or whole files with a manifest; their union.
Invariant: batches are cut before they are shared, and what is put together was made from the same inputs
(one manifest), so the number of jobs changes no byte; what was done before a kill is found again.
Trade-off: each job writes to a folder of its own, and one process reads them all (1 s for 100,000 lines),
so that jobs need no lock on a shared disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sftcore.errors import Problem, UserInputError
from sftcore.fsio import append_jsonl, read_jsonl, read_object, sha256_of_file, write_json, write_jsonl

log = logging.getLogger(__name__)
T = TypeVar("T")
SHARDS = "shards"


@dataclass(frozen=True, slots=True)
class Share:
    """A job's share of work that is cut in batches: batches job, job + num_jobs, ...

    Batches are cut before they are shared, so results don't depend on the number of jobs.
    """

    job: int = 0
    num_jobs: int = 1

    def __str__(self) -> str:
        return f"{self.job}/{self.num_jobs}"

    def of(self, batches: Sequence[T]) -> Sequence[T]:
        """This job's batches.

        >>> Share(1, 3).of("abcdefgh")
        'beh'
        """
        return batches[self.job :: self.num_jobs]

    def folder(self, root: Path) -> Path:
        """This job's own folder.

        >>> Share(1, 3).folder(Path("RUN")).as_posix()
        'RUN/shards/1-of-3'
        """
        return root / SHARDS / self.name

    @property
    def name(self) -> str:
        """Of its folder or lock."""
        return f"{self.job}-of-{self.num_jobs}"


WHOLE = Share()


def share_of(shard: str, *, is_alone: bool = True) -> Share:
    """The share that "i/N" names.

    Args:
        is_alone: no other option was given that needs all shards.

    Raises:
        UserInputError: not of that form, or not alone.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or int(match[1]) >= int(match[2]):
        what, allowed = "a share is i/N with i from 0 to N-1", _shares_of(int(match[2]) if match else 0)
        raise UserInputError(Problem(what=what, where="--shard", got=shard, allowed=allowed))
    if not is_alone:
        raise UserInputError(Problem(what="--merge and --check need all shards", where="--shard", got=shard))
    return Share(int(match[1]), int(match[2]))


def _shares_of(count: int) -> str:
    """The shares that there are.

    >>> _shares_of(3), _shares_of(1)
    ('0/3 to 2/3', '0/1')
    """
    if not count:
        return "e.g. 0/4 to 3/4"
    return f"0/{count} to {count - 1}/{count}" if count > 1 else "0/1"


def share_done(share: Share, done: str, *, command: str) -> str:
    """What a job says at its end.

    >>> share_done(Share(0, 2), "3 of 6 batches are done", command="probe")
    'shard 0/2: 3 of 6 batches are done; then: sftcore probe RECIPE --merge'
    """
    return f"shard {share}: {done}; then: sftcore {command} RECIPE --merge"


def shard_folders(root: Path) -> list[Path]:
    """The folders that jobs have begun."""
    return sorted(root.glob(f"{SHARDS}/*-of-*"))


def whole_set(folders: Sequence[Path]) -> list[Path] | None:
    """Those of the folders that make a whole: all of one number of jobs; None if there are none.

    >>> whole_set([Path("0-of-2"), Path("0-of-3"), Path("1-of-2")])
    [PosixPath('0-of-2'), PosixPath('1-of-2')]
    """
    groups: dict[int, list[Path]] = {}
    for folder in folders:
        groups.setdefault(int(folder.name.rpartition("-")[2]), []).append(folder)
    return next((group for num_jobs, group in groups.items() if len(group) == num_jobs), None)


@dataclass(frozen=True, slots=True)
class Partial:
    """A file of finished batches, a line each; its first line is the manifest of what they were made from."""

    file: Path
    manifest: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """The batches that it holds; none of them if they were made from other inputs."""
        rows = read_jsonl(self.file, appended=True) if self.file.is_file() else []
        return rows[1:] if rows and rows[0] == self.manifest else []

    def start(self) -> list[dict[str, Any]]:
        """Make it ready to append to; returns what it holds of these inputs.

        A last line that a kill has cut is dropped, so that the next one starts on a line of its own.
        """
        rows = self.rows()
        write_jsonl(self.file, [dict(self.manifest), *rows])
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished batch."""
        append_jsonl(self.file, dict(row))


def partials(root: Path, name: str, manifest: Mapping[str, Any]) -> Iterator[Partial]:
    """The files of finished batches in a folder and in those of its shards."""
    files = [root / name, *(folder / name for folder in shard_folders(root))]
    return (Partial(file, manifest) for file in files if file.is_file())


@dataclass(frozen=True, slots=True)
class Vouched:
    """Files in a folder with the manifest that is written after them: their inputs and checksums."""

    folder: Path
    files: Sequence[str]
    manifest: Mapping[str, Any]
    name: str = "manifest.json"

    def withdraw(self) -> None:
        """Before its files are written again."""
        (self.folder / self.name).unlink(missing_ok=True)

    def vouch(self) -> None:
        """Write the manifest, last: with the checksums of those files that are there."""
        found = [self.folder / name for name in self.files if (self.folder / name).is_file()]
        sums = {file.name: sha256_of_file(file) for file in found}
        write_json(self.folder / self.name, {**self.manifest, "files": sums})

    def is_made(self) -> bool:
        """Whether the files were made from these inputs and are whole; damaged ones are to be made again."""
        if not (self.folder / self.name).exists():
            return False
        try:
            kept = read_object(self.folder / self.name)
            written = kept.pop("files", {})
            if kept != self.manifest:
                return False
            if not (isinstance(written, dict) and written):  # of a version that noted none
                return all(self._holds_values(name) for name in self.files)
            changed = [name for name, digest in written.items() if self._digest(name) != digest]
        except UserInputError as error:
            log.warning("made again: %s", error)
            return False
        if changed:
            log.warning("made again: %s changed since it was written", self.folder / changed[0])
        return not changed

    def _holds_values(self, name: str) -> bool:
        path = self.folder / name
        return bool(read_jsonl(path) if path.suffix == ".jsonl" else read_object(path))

    def _digest(self, name: str) -> str:
        return sha256_of_file(self.folder / name) if (self.folder / name).is_file() else ""
