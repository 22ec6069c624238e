"""The snapshots that generators may ask for: what the learner published, by version and by digest.

Owned by the broker process; the files are the learner's, who never writes over one that is mapped (learner/
snapshot_ring.py). So a file that this shelf has mapped stands, and the rule is here how long that is:

- Only what somebody pulls is mapped. A pull ends when its reader holds the version, asks for another, leaves, or has
  asked for no chunk for so long that it counts as dead.
- The newest can always be pulled. An older one can be finished by those who began in time, as long as a generator that
  holds it could be given a lease, and only one such version at a time, the oldest. All others are told to ask for the
  newest. So shared memory holds three snapshots at most: the newest, the one being finished, the one being written.
- A base, which versions of adapters name, can be pulled as long as one of them is known. The learner never writes over
  it, so who pulls it stands in nobody's way.

The broker's own memory does not grow with the weights: it holds the chunks that are under way to their readers. Those
are copies, since a view that waits for a slow reader would keep the file mapped after this shelf has let it go.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import SnapshotError
from protocol.messages import Publish
from protocol.snapshot_file import Bytes
from protocol.weights import Manifest, Snapshot

KEPT = 2  # the newest version, and the one before it: generators hear of the newest only once the learner advances
REMEMBERED = 64  # newest versions whose digests are known: an evaluation may outlive its snapshot


@dataclass(frozen=True, eq=False)
class Shelved:
    """One published version, or a base."""

    version: int
    digest: str
    manifest: bytes
    path: str
    host: str
    base: str = ""  # digest


@dataclass(frozen=True, slots=True)
class Pull:
    """What one reader pulls, and when it last asked for a chunk of it."""

    digest: str
    asked_at: float


class Shelf:
    """Newest version last. Emptied with every epoch."""

    def __init__(self) -> None:
        self._versions: OrderedDict[int, Shelved] = OrderedDict()
        self._digests: OrderedDict[int, str] = OrderedDict()
        self._bases: dict[str, Shelved] = {}  # by digest
        self._pulls: dict[int, Pull] = {}  # by reader
        self._mapped: dict[str, Snapshot] = {}  # by digest; each has a reader

    def put(self, publish: Publish, oldest_useful: int = 0) -> None:
        """Take a new version; no lease is given any more to who holds a version below `oldest_useful`.

        Raises SnapshotError if the manifest is none, ValueError if it is not the one the digest names, LookupError if
        it names a base that is not here.
        """
        manifest = _manifest(publish)
        if manifest.base and manifest.base not in self._bases:
            raise LookupError(f"version {publish.version} stands beside {manifest.base[:12]}, which is not published")
        self._versions.pop(publish.version, None)
        self._versions[publish.version] = _shelved(publish, manifest)
        self._digests[publish.version] = publish.digest
        for table, limit in ((self._versions, KEPT), (self._digests, REMEMBERED)):
            while len(table) > limit:
                table.popitem(last=False)
        self._keep_bases_that_are_named()
        self._mapped.pop(publish.digest, None)  # equal weights of an older version: from now on of this one's file
        older = [snapshot for digest, snapshot in self._mapped.items() if digest not in self._bases]
        useful = [snapshot for snapshot in older if snapshot.version >= oldest_useful]
        stays = min(useful, key=lambda snapshot: snapshot.version, default=None)
        self._mapped = {} if stays is None else {stays.digest: stays}  # a base is mapped anew by who asks for it

    def put_base(self, publish: Publish) -> None:
        """Take what later versions stand beside. Raises as `put`, and ValueError if it names a base itself."""
        manifest = _manifest(publish)
        if manifest.base:
            raise ValueError(f"a base has no base, {publish.digest[:12]} names {manifest.base[:12]}")
        self._keep_bases_that_are_named()
        self._bases[publish.digest] = _shelved(publish, manifest)

    def _keep_bases_that_are_named(self) -> None:
        named = {shelved.base for shelved in self._versions.values()}
        self._bases = {digest: base for digest, base in self._bases.items() if digest in named}

    def clear(self) -> None:
        self._versions.clear()
        self._bases.clear()
        self._digests.clear()
        self._pulls.clear()
        self._mapped.clear()

    def digest(self, version: int) -> str:
        """Of the snapshot that was published under this number; "" when none was, or long ago."""
        return self._digests.get(version, "")

    def version(self, version: int) -> Shelved | None:
        return self._versions.get(version)

    def base(self, digest: str) -> Shelved | None:
        return self._bases.get(digest)

    def chunk(self, digest: str, index: int, reader: int, now: float) -> Bytes:
        """A copy of one chunk. Raises SnapshotError when it is not to be had any more."""
        snapshot = self._mapped.get(digest) or self._open(digest)
        chunk = snapshot.chunk(index).copy()
        self._mapped[digest] = snapshot
        self._pulls[reader] = Pull(digest, now)
        return chunk

    def ended(self, reader: int, digest: str = "") -> None:
        """This reader pulls nothing more; with `digest`: nothing more of that."""
        pull = self._pulls.get(reader)
        if pull is not None and digest in ("", pull.digest):
            del self._pulls[reader]
            self._let_go()

    def expire(self, now: float, limit_s: float) -> None:
        """End the pulls of readers that have been silent for longer than `limit_s`."""
        self._pulls = {reader: pull for reader, pull in self._pulls.items() if now - pull.asked_at <= limit_s}
        self._let_go()

    def _open(self, digest: str) -> Snapshot:
        shelved = self._bases.get(digest) or self._pullable(digest)
        snapshot = Snapshot.open(Path(shelved.path), shelved.version)
        if snapshot.digest != digest:
            raise SnapshotError(f"its folder holds {snapshot.digest[:12]} now")
        return snapshot

    def _pullable(self, digest: str) -> Shelved:
        shelved = next((entry for entry in reversed(self._versions.values()) if entry.digest == digest), None)
        if shelved is None:
            raise SnapshotError("it is not on the shelf")
        newest = next(reversed(self._versions.values()))
        others = self._mapped.keys() - self._bases.keys() - {newest.digest}
        if shelved is not newest and others:
            raise SnapshotError("an older one is being finished")
        return shelved

    def _let_go(self) -> None:
        """Unmap what nobody pulls."""
        pulled = {pull.digest for pull in self._pulls.values()}
        self._mapped = {digest: snapshot for digest, snapshot in self._mapped.items() if digest in pulled}


def _manifest(publish: Publish) -> Manifest:
    """Raises SnapshotError if it is none, ValueError if it is not the one the digest names."""
    manifest = Manifest.from_bytes(publish.manifest)
    if manifest.digest != publish.digest:
        raise ValueError(f"the manifest's digest is {manifest.digest[:12]}, the message says {publish.digest[:12]}")
    return manifest


def _shelved(publish: Publish, manifest: Manifest) -> Shelved:
    return Shelved(publish.version, publish.digest, publish.manifest, publish.path, publish.host, manifest.base)
