"""Folders in shared memory: one per process, readable by its user only, removed when their process is gone.

`/dev/shm/tether-<uid>/<label>-<pid>`. A killed process cannot clean up; the next one of any run does
(`private_folder`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from protocol.errors import PreflightError


def private_folder(label: str) -> Path:
    """A new, empty folder of this process; removes those of processes that are gone.

    Raises PreflightError if it is not ours.
    """
    base = _base()
    with contextlib.suppress(FileExistsError):  # a file or a dangling link, which is refused below
        base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode):
        raise PreflightError(f"{base} must be a folder of user {os.getuid()} with mode 700; remove what lies there")
    for folder in base.iterdir():
        if not _alive(folder.name.rpartition("-")[2]):
            shutil.rmtree(folder, ignore_errors=True)
    own = folder_of(label, os.getpid())
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(mode=0o700)
    return own


def folder_of(label: str, pid: int) -> Path:
    """Where process `pid` has its folder: how the ranks of one learner find the one that they share."""
    return _base() / f"{label}-{pid}"


def _base() -> Path:
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / f"tether-{os.getuid()}"


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
