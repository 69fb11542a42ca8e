"""Checksums of files that are asked for again and again.

In: paths. Out: their SHA-256, read from the file's bytes or remembered.
Invariant: a remembered checksum is used only while size, inode, and the times of the last modification and of
the last change of any kind (which no tool sets back) are those of then, and only if the file was at least 2 s
old when it was read (a change within one tick of the clock can't hide).
Trade-off: bits that rot on the disk without a write are not seen again after the first look; in return a
ready store of 10 GB opens in milliseconds instead of 10 s. What this process wrote itself is not read again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftcore.fsio import sha256_of_file, write_json

SETTLED_NANOSECONDS = 2 * 10**9  # the coarsest clock of a common file system (FAT)


class KnownDigests:
    """Checksums remembered in one JSON file; `save` writes what was learned.

    Args:
        path: of that file; one that can't be read counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_changed = False
        self._known: dict[str, Any] = {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self._known = known if isinstance(known, dict) else {}

    def sha256(self, file: Path) -> str:
        """The checksum of a file's bytes, as hex."""
        key, stat = _key(file), file.stat()
        match self._known.get(key):
            case {"state": known, "sha256": str(digest)} if known == _state(stat):
                return digest
        looked = time.time_ns()
        digest = sha256_of_file(file)
        if _changed(stat) + SETTLED_NANOSECONDS < looked:
            self._remember(key, stat, digest)
        return digest

    def learn(self, digests: Mapping[Path, str], *, since: int) -> None:
        """Checksums of files that this process wrote, unless they are too young or older than that.

        Args:
            since: nanoseconds since 1970 when the writing began.
        """
        now = time.time_ns()
        for file, digest in digests.items():
            stat = file.stat()
            if since <= stat.st_mtime_ns and _changed(stat) < now - SETTLED_NANOSECONDS:
                self._remember(_key(file), stat, digest)

    def _remember(self, key: str, stat: os.stat_result, digest: str) -> None:
        self._known[key] = {"state": _state(stat), "sha256": digest}
        self._is_changed = True

    def save(self) -> None:
        """Write what was learned, if anything; entries of files that are gone are dropped."""
        if not self._is_changed:
            return
        write_json(self.path, {key: entry for key, entry in self._known.items() if Path(key).is_file()})
        self._is_changed = False


def _key(file: Path) -> str:
    return str(file.resolve()).encode("utf-8", "backslashreplace").decode()


def _changed(stat: os.stat_result) -> int:
    """When a file was last written, or had its times set."""
    return max(stat.st_mtime_ns, stat.st_ctime_ns)


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
