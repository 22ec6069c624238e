"""Checkpoints as folders: which there are, whether one is whole, and the manifest that vouches for its files.

`learner/checkpoint.py` writes and reads what is in them; who only asks needs no torch. That a damaged checkpoint is
never used rests on `damage`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FORMAT = 2
MANIFEST_FILE = "manifest.json"
PREFIX = "step_"


@dataclass(frozen=True)
class Found:
    """What `latest_valid` saw."""

    path: Path | None  # newest checkpoint that verifies
    damaged: tuple[str, ...]  # newer ones, each with what is wrong


def checkpoints(folder: Path) -> list[Path]:
    """Those in `folder`, oldest first, whole or not."""
    found = (path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The policy version in a checkpoint, by its name."""
    return int(path.name.removeprefix(PREFIX))


def latest_valid(folder: Path) -> Found:
    """The newest checkpoint whose every byte is as it was written. Reads them whole; local, call it on one rank."""
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if not reason:
            return Found(path, tuple(damaged))
        damaged.append(f"{path}: {reason}")
    return Found(None, tuple(damaged))


def damage(path: Path, below: str = "") -> str:
    """What is wrong with a checkpoint, "" if nothing; `below`: look only at files whose names begin so."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        if manifest["format"] != FORMAT:
            return f"format {FORMAT} expected, got {manifest['format']}"
        for name, (size, digest) in manifest["files"].items():
            if not name.startswith(below):
                continue
            if (path / name).stat().st_size != size:
                return f"{name} must have {size} bytes, has {(path / name).stat().st_size}"
            if _digest(path / name) != digest:
                return f"{name} does not match its digest"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {type(error).__name__}: {error}"
    return ""


def seal(folder: Path, step: int, num_applied: Mapping[str, int]) -> None:
    """Sync every file, then write the manifest that vouches for them, and sync that."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync(path)
    files = {str(path.relative_to(folder)): (path.stat().st_size, _digest(path)) for path in paths}
    manifest = {"format": FORMAT, "step": step, "num_applied": dict(num_applied), "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in (folder / MANIFEST_FILE, *{path.parent for path in paths}, folder):
        sync(path)


def sync(path: Path) -> None:
    """A file, or the names in a folder, are on the disk after this."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
