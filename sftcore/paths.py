"""What a path leads to, before it is opened.

In: a path that somebody gave. Out: why it can't be read as a file, or be a folder; empty if it can.
Invariant: no path makes these functions raise, whatever its letters and its length.
Trade-off: a look is one system call more, and the file may change after it: it saves from reading a device
without end and from waiting for a pipe's other end, not from races.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

SPECIAL_FILES = {
    stat.S_IFDIR: "this is a folder, not a file",
    stat.S_IFIFO: "this is a pipe, not a file: it can't be read twice",
    stat.S_IFCHR: "this is a device, not a file",
    stat.S_IFBLK: "this is a device, not a file",
    stat.S_IFSOCK: "this is a socket, not a file",
}


def file_fault(path: Path | str) -> str:
    """Why a path can't be read as a file; empty for a file (also through links)."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return "no such file: a link that leads nowhere" if os.path.islink(path) else "no such file"
    except (OSError, ValueError) as error:  # too long a name, links in a circle; a NUL in the name
        return f"no such file: {error.strerror if isinstance(error, OSError) else error}"
    return SPECIAL_FILES.get(kind, "")


def folder_fault(path: Path) -> str:
    """Why a path can't be a folder, or become one; empty if it can."""
    try:
        str(path).encode()
        return "" if stat.S_ISDIR(os.stat(path).st_mode) else f"{path} is a file, not a folder"
    except UnicodeEncodeError:
        return "its name is not UTF-8 text"
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"{path} is a link that leads nowhere"
        return folder_fault(path.parent) if path.parent != path else ""
    except (OSError, ValueError) as error:  # too long a name, links in a circle, a NUL in the name
        return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
