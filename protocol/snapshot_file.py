"""A snapshot's folder on this host: who may read its flat file, and who may write it.

Used by the learner that writes, by the broker and the generators that read. A flat file may be written over with a
later version, but never under a reader: readers map it under a shared lock (`read_folder`), its writer takes an
exclusive one (`SnapshotPart`). Both are the kernel's (flock): a lock belongs to the open file, which a mapping keeps
open, so a reader holds the snapshot exactly as long as it has a view of it, and a process that dies holds nothing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.errors import SnapshotError

WEIGHTS_FILE = "weights.bin"
MANIFEST_FILE = "manifest.json"

Bytes = NDArray[np.uint8]


def read_folder(folder: Path) -> tuple[bytes, Bytes]:
    """The manifest, and the flat file mapped privately: writing to a view never reaches the file.

    Raises OSError if one of them is missing, BlockingIOError while the file is being written.
    """
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # the folder may be renamed meanwhile, with both files in it
    try:
        weights = os.open(WEIGHTS_FILE, os.O_RDONLY, dir_fd=place)
        try:
            fcntl.flock(weights, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.fstat(weights).st_size:
                return _read(place), np.empty(0, np.uint8)
            return _read(place), np.frombuffer(mmap.mmap(weights, 0, access=mmap.ACCESS_COPY), np.uint8)
        finally:
            os.close(weights)
    finally:
        os.close(place)


def _read(place: int) -> bytes:
    with open(MANIFEST_FILE, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=place)) as file:
        return file.read()


class SnapshotPart:
    """A folder while it is written: `<folder>.part`, with a flat file of full length that is mapped shared.

    With `create` it is made and locked; without, another process has made it and we help to fill it. Raises
    SnapshotError if there is no room.
    """

    def __init__(self, folder: Path, num_bytes: int, create: bool) -> None:
        self.folder, self._place = folder, _aside(folder)
        flags = os.O_RDWR
        if create:
            _require_room(folder.parent, num_bytes)
            self._place.mkdir(mode=0o700)
            flags |= os.O_CREAT | os.O_EXCL
        weights = os.open(self._place / WEIGHTS_FILE, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(weights, 0, num_bytes)  # a full memory is an error here; later it would be a signal
            self.data: Bytes = np.frombuffer(mmap.mmap(weights, num_bytes), dtype=np.uint8)
        except OSError as error:
            if not create:
                raise SnapshotError(f"{num_bytes} bytes of {self._place} cannot be mapped: {error.strerror}") from error
            shutil.rmtree(self._place)
            raise _no_room(self._place, num_bytes, error) from error
        finally:
            os.close(weights)
        if create:
            assert self._lock(), f"{self._place} was just made"

    def publish(self, manifest: bytes) -> Path:
        """Give the folder its name and let readers in. Raises SnapshotError if there is no room; try again then."""
        try:
            (self._place / MANIFEST_FILE).write_bytes(manifest)
        except OSError as error:
            raise _no_room(self._place, len(manifest), error) from error
        os.rename(self._place, self.folder)
        self._place = self.folder
        self._unlock()
        return self.folder

    def take_back(self) -> bool:
        """Take the name from a published folder, to fill it anew; False: somebody reads it."""
        if not self._lock():
            return False
        os.unlink(self._place / MANIFEST_FILE)
        self._move(_aside(self.folder))
        return True

    def rename(self, folder: Path) -> None:
        """Let `publish` give it this name."""
        self.folder = folder
        self._move(_aside(folder))

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._place)
        self._unlock()

    def _lock(self) -> bool:
        """Through an open file of its own, which the mapping does not keep."""
        writing = os.open(self._place / WEIGHTS_FILE, os.O_RDWR)
        try:
            fcntl.flock(writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(writing)
            return False
        self._writing = writing
        return True

    def _unlock(self) -> None:
        """By name: closing alone would leave it to a process that is being started and has a copy of every file."""
        fcntl.flock(self._writing, fcntl.LOCK_UN)
        os.close(self._writing)

    def _move(self, place: Path) -> None:
        os.rename(self._place, place)
        self._place = place


def _require_room(place: Path, num_bytes: int) -> None:
    """Raise SnapshotError if there is too little: allocating in vain takes for a moment all that others could have."""
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < num_bytes:  # no blocks: a memory without a limit of its own
        raise SnapshotError(f"no room for {num_bytes} bytes in {place}: {free} are free")


def _no_room(place: Path, num_bytes: int, error: OSError) -> SnapshotError:
    return SnapshotError(f"no room for {num_bytes} bytes in {place}: {error.strerror}")


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")
