"""The snapshots that stand in shared memory, and the files that the next one is written into.

Owned by rank 0 of the learner. The rule: the newest always stands, since anybody may join; an older one stands as long
as a process has it mapped (an engine that loads it, the broker for who pulls it), and not a publication longer. What
nobody has mapped any more is written over: fresh pages of shared memory cost several times a copy (bench/publish.py).
So two files take turns, and a third is made only beside one that is still read: the broker keeps one such version at
most (broker/shelf.py), and engines of this host are done with theirs before the step is. Where they are not there may
be more, as far as there is room; then the learner waits for one of them (`begin`). That no file changes under a reader
rests on `SnapshotWriter.take_back`.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from protocol.errors import PeerTimeout, SnapshotError
from protocol.weights import SnapshotWriter, TensorSpec

log = logging.getLogger("tether.snapshots")

ROOM_S = 60.0  # for readers to let go of what they have mapped, when memory is full
LOOK_S = 0.05


class SnapshotRing:
    """Owns `folder`, readable by this user only; what lies there from an earlier run is removed."""

    def __init__(self, folder: Path, layout: tuple[TensorSpec, ...]) -> None:
        self._folder = folder
        self._layout = layout
        self._standing: list[SnapshotWriter] = []  # newest last
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)

    def begin(self, version: int) -> SnapshotWriter:
        """A writer for the next version; the one before must be finished.

        Waits only when memory is full and others are still read. Raises PeerTimeout naming them if they stay,
        SnapshotError if there is nobody to wait for.
        """
        place = place_of(self._folder, version)
        writer = self._take_back() or self._made(place) or self._awaited(place)
        writer.rename(place)
        self._standing.append(writer)
        return writer

    def _made(self, place: Path) -> SnapshotWriter | None:
        """A new one; None when memory is full and others are still read. Raises SnapshotError if none is."""
        try:
            return SnapshotWriter(place, self._layout)
        except SnapshotError:
            if len(self._standing) < 2:
                raise
            return None

    def _awaited(self, place: Path) -> SnapshotWriter:
        """One that its readers let go of, or a new one when there is room by itself."""
        end = time.monotonic() + ROOM_S
        held = ", ".join(writer.folder.name for writer in self._standing[:-1])
        log.warning("no room for snapshot %s: waiting until nobody reads one of %s any more", place.name, held)
        while (writer := self._take_back() or self._made(place)) is None:
            if time.monotonic() > end:
                raise PeerTimeout(
                    f"waited {ROOM_S:.0f} s for room for snapshot {place.name} in {self._folder}: the broker or a "
                    f"generator of this host still reads {held}"
                )
            time.sleep(LOOK_S)  # a lock that goes tells nobody
        return writer

    def _take_back(self) -> SnapshotWriter | None:
        """One that is older than the newest and that nobody has mapped; others like it are removed."""
        held: list[SnapshotWriter] = []
        free: list[SnapshotWriter] = []
        for writer in self._standing[:-1]:
            (free if writer.take_back() else held).append(writer)
        for spare in free[1:]:
            spare.discard()
        self._standing = held + self._standing[-1:]
        return free[0] if free else None


def place_of(folder: Path, version: int) -> Path:
    """Where the snapshot of `version` gets its name."""
    return folder / f"v{version}"
