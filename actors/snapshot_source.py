"""Where a generator gets a version's weights from: the learner's own file on this host, or chunks pulled from the
broker.

Either way the result is a local snapshot whose manifest has the digest that the broker announced. A pull goes on
after a break where it stopped, verifies every chunk before it is kept, and ends with SnapshotError when the version
has vanished meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import ProtocolError
from protocol.messages import Bytes, FetchChunk, FetchManifest, ManifestAnswer
from protocol.session import Session
from protocol.weights import Manifest, Snapshot, SnapshotAssembly, SnapshotError

log = logging.getLogger("tether.weights")

CHUNKS_IN_FLIGHT = 4


def _open(folder: Path, version: int, digest: str) -> Snapshot:
    snapshot = Snapshot.open(folder, version)
    if snapshot.digest != digest:
        raise SnapshotError(f"{folder} holds {snapshot.digest[:12]}, {digest[:12]} was announced")
    return snapshot


class SnapshotSource:
    """Fetches snapshots by version. `staging` is this process's own folder in shared memory."""

    def __init__(self, session: Session, staging: Path, wait_s: float) -> None:
        self._session = session
        self._staging = staging
        self._wait_s = wait_s

    async def fetch(self, version: int) -> Snapshot:
        """The snapshot of `version`. Raises SnapshotError if it is gone: ask for the newest then."""
        try:
            answer = await self._session.ask(FetchManifest(version=version), timeout_s=self._wait_s)
        except ProtocolError as error:
            raise SnapshotError(f"version {version} is not to be had: {error}") from None
        assert isinstance(answer, ManifestAnswer)
        manifest = Manifest.from_bytes(answer.manifest)
        if manifest.digest != answer.digest:
            raise SnapshotError(f"the manifest of version {version} does not match its digest {answer.digest[:12]}")
        if answer.path:
            try:
                return await asyncio.to_thread(_open, Path(answer.path), answer.version, manifest.digest)
            except SnapshotError as error:  # another user's folder, perhaps; if it is gone, the pull will say so
                log.warning("version %d cannot be read in place, pulling it instead: %s", version, error)
        return await self._pull(manifest, answer.version)

    def discard(self, snapshot: Snapshot) -> None:
        """Free a pulled snapshot once it is applied; the learner's own files are the learner's to free."""
        if snapshot.folder.parent == self._staging:
            shutil.rmtree(snapshot.folder, ignore_errors=True)

    async def _pull(self, manifest: Manifest, version: int) -> Snapshot:
        folder = self._staging / manifest.digest[:16]
        shutil.rmtree(folder, ignore_errors=True)
        assembly = SnapshotAssembly(folder, manifest)
        queue = iter(sorted(assembly.missing))
        log.info("pulling version %d: %d chunks", version, len(assembly.missing))
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(CHUNKS_IN_FLIGHT):
                    workers.create_task(self._pull_chunks(queue, assembly, manifest.digest))
        except* SnapshotError as errors:
            assembly.discard()
            raise errors.exceptions[0] from None
        return await asyncio.to_thread(assembly.finish, version)

    async def _pull_chunks(self, queue: Iterator[int], assembly: SnapshotAssembly, digest: str) -> None:
        for index in queue:
            question = FetchChunk(digest=digest, index=index)
            try:
                answer = await self._session.ask(
                    question, bulk=True, timeout_s=self._wait_s, what=f"chunk {index} of the weights"
                )
            except ProtocolError as error:
                raise SnapshotError(f"chunk {index} of {digest[:12]} is not to be had: {error}") from None
            assert isinstance(answer, Bytes)
            await asyncio.to_thread(assembly.put, index, answer.data)
