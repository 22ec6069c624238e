"""Whether anybody reads a snapshot."""

from __future__ import annotations

import fcntl
from pathlib import Path

from protocol.snapshot_file import WEIGHTS_FILE


def is_held(folder: Path) -> bool:
    """Whether any process, this one included, has the weights in this folder mapped: they may not be written over."""
    with open(folder / WEIGHTS_FILE, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
