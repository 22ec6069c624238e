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
from protocol.weights import Bytes, Manifest, Snapshot

KEPT = 3  # newest versions on the shelf


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
        while len(self._versions) > KEPT:
            _, old = self._versions.popitem(last=False)
            self._mapped.pop(old.digest, None)

    def clear(self) -> None:
        self._versions.clear()
        self._mapped.clear()

    def version(self, version: int) -> Shelved | None:
        return self._versions.get(version)

    def chunk(self, digest: str, index: int) -> Bytes:
        """Bytes of one chunk. Raises SnapshotError or KeyError when it is not to be had any more."""
        snapshot = self._mapped.get(digest)
        if snapshot is None:
            shelved = next(entry for entry in self._versions.values() if entry.digest == digest)
            snapshot = self._mapped[digest] = Snapshot.open(Path(shelved.path), shelved.version)
            snapshot.data  # noqa: B018  mapped now: it stays readable after the folder is removed
        return snapshot.chunk(index)
