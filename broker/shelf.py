"""The snapshots that generators may ask for: what the learner published, by version and by digest.

Owned by the broker process. Files are the learner's; a snapshot that is being pulled stays mapped, so it can be
finished even after the learner has removed its folder. The broker's own memory does not grow with the weights: chunks
are views of the map.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from protocol.messages import Publish
from protocol.weights import Bytes, Manifest, Snapshot, SnapshotError

KEPT = 3  # newest versions on the shelf
REMEMBERED = 64  # newest versions whose digests are known: an evaluation may outlive its snapshot


@dataclass(frozen=True, eq=False)
class Shelved:
    """One published version."""

    version: int
    digest: str
    manifest: bytes
    path: str
    host: str


class Shelf:
    """Newest version last. Emptied with every epoch."""

    def __init__(self) -> None:
        self._versions: OrderedDict[int, Shelved] = OrderedDict()
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._mapped: dict[str, Snapshot] = {}

    def put(self, publish: Publish) -> None:
        """Raises SnapshotError if the manifest is none, or not the one the digest names."""
        manifest = Manifest.from_bytes(publish.manifest)
        if manifest.digest != publish.digest:
            raise ValueError(f"the manifest's digest is {manifest.digest[:12]}, the message says {publish.digest[:12]}")
        self._versions.pop(publish.version, None)
        self._versions[publish.version] = Shelved(
            publish.version, publish.digest, publish.manifest, publish.path, publish.host
        )
        self._digests[publish.version] = publish.digest
        for table, limit in ((self._versions, KEPT), (self._digests, REMEMBERED)):
            while len(table) > limit:
                table.popitem(last=False)
        shelved = {entry.digest for entry in self._versions.values()}
        self._mapped = {digest: snapshot for digest, snapshot in self._mapped.items() if digest in shelved}

    def clear(self) -> None:
        self._versions.clear()
        self._digests.clear()
        self._mapped.clear()

    def digest(self, version: int) -> str:
        """Of the snapshot that was published under this number; "" when none was, or long ago."""
        return self._digests.get(version, "")

    def version(self, version: int) -> Shelved | None:
        return self._versions.get(version)

    def chunk(self, digest: str, index: int) -> Bytes:
        """Bytes of one chunk. Raises SnapshotError when it is not to be had any more."""
        snapshot = self._mapped.get(digest)
        if snapshot is None:
            shelved = next((entry for entry in reversed(self._versions.values()) if entry.digest == digest), None)
            if shelved is None:
                raise SnapshotError("it is not on the shelf")
            snapshot = Snapshot.open(Path(shelved.path), shelved.version)
            if snapshot.digest != digest:
                raise SnapshotError(f"its folder holds {snapshot.digest[:12]} now")
            snapshot.data  # noqa: B018  mapped now: it stays readable after the folder is removed
            self._mapped[digest] = snapshot
        return snapshot.chunk(index)
