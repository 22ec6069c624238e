"""Where a generator gets a version's weights from: the learner's own file on this host, or chunks pulled from the
broker.

Either way the result is a local snapshot whose manifest has the digest that the broker announced. A pull verifies
every chunk before it is kept, and ends with SnapshotError when one is not to be had, or wrong. What has come by then,
and what came in full and was not used, is kept until other weights are pulled: that no verified chunk crosses the wire
twice rests on `_begun` and `_whole`. What is asked for and has not come lies in the broker's memory: `_pull_chunks`
asks for more at once only as long as the line brings it soon.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from protocol.errors import ProtocolError, SnapshotError
from protocol.messages import Bytes, FetchChunk, FetchManifest, ManifestAnswer
from protocol.session import Session
from protocol.weights import Manifest, Snapshot, SnapshotAssembly

log = logging.getLogger("tether.weights")

CHUNKS_IN_FLIGHT = 4  # at most
SLOW_S = 2.0  # a chunk that took longer waited for the line: one less is asked for at once


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
        self._part: SnapshotAssembly | None = None  # of a pull that was broken off
        self._whole: Snapshot | None = None  # what was pulled last, until it is discarded
        self._num_in_flight = 1

    async def fetch(self, version: int) -> Snapshot:
        """The snapshot of `version`. Raises SnapshotError if it is not to be had: ask for the newest then."""
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

    async def discard(self, snapshot: Snapshot) -> None:
        """Free a pulled snapshot once it is applied; the learner's own files are the learner's to free."""
        if snapshot.folder.parent == self._staging:
            self._whole = None
            await asyncio.to_thread(shutil.rmtree, snapshot.folder, ignore_errors=True)

    async def _pull(self, manifest: Manifest, version: int) -> Snapshot:
        if self._whole is not None and self._whole.digest == manifest.digest:
            return replace(self._whole, version=version)
        part = self._part = await self._begun(manifest)
        queue = iter(sorted(part.missing))
        log.info("pulling version %d: %d of %d chunks", version, len(part.missing), len(manifest.chunk_digests))
        failed: Exception | None = None
        self._num_in_flight = 1
        try:
            async with asyncio.TaskGroup() as workers:
                workers.create_task(self._pull_chunks(queue, part, workers))
        except* SnapshotError as errors:
            failed = errors.exceptions[0]
        if failed is not None:  # not raised above: up to Python 3.11.3 it would come out wrapped in a group
            raise failed from None
        self._whole = await asyncio.to_thread(part.finish, version)
        self._part = None
        return self._whole

    async def _begun(self, manifest: Manifest) -> SnapshotAssembly:
        """What has come of these weights so far. What has come of others is of no use any more.

        Making and removing gigabytes takes long, so both are done in a thread.
        """
        if self._whole is not None:
            await self.discard(self._whole)
        if self._part is not None and self._part.manifest.digest != manifest.digest:
            await asyncio.to_thread(self._part.discard)
            self._part = None
        place = self._staging / manifest.digest[:16]
        return self._part or await asyncio.to_thread(SnapshotAssembly, place, manifest)

    async def _pull_chunks(self, queue: Iterator[int], part: SnapshotAssembly, workers: asyncio.TaskGroup) -> None:
        clock = asyncio.get_running_loop().time
        for index in queue:
            asked_at = clock()
            await self._pull_chunk(index, part)
            took_s = clock() - asked_at
            if took_s > SLOW_S and self._num_in_flight > 1:
                self._num_in_flight -= 1
                return
            if took_s < SLOW_S / 2 and self._num_in_flight < CHUNKS_IN_FLIGHT:
                self._num_in_flight += 1
                workers.create_task(self._pull_chunks(queue, part, workers))

    async def _pull_chunk(self, index: int, part: SnapshotAssembly) -> None:
        digest = part.manifest.digest
        question = FetchChunk(digest=digest, index=index)
        try:
            answer = await self._session.ask(
                question, bulk=True, timeout_s=self._wait_s, what=f"chunk {index} of the weights"
            )
        except ProtocolError as error:
            raise SnapshotError(f"chunk {index} of {digest[:12]} is not to be had: {error}") from None
        assert isinstance(answer, Bytes)
        await asyncio.to_thread(part.put, index, answer.data)
