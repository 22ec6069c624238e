"""Where a generator gets a version's weights from: the learner's own file on this host, or chunks pulled from the
broker.

Either way the result is a local snapshot whose manifest has the digest that the broker announced. A pull verifies
every chunk before it is kept, and ends with SnapshotError when one is not to be had, or wrong. What has come by then,
and what came in full and was not used, is kept until other weights are pulled: that no verified chunk crosses the wire
twice rests on `_begun` and `Pulled.whole`. The base that adapters stand beside is fetched once, before the first of
them, and kept apart: a version that vanishes meanwhile takes nothing of it along. What is asked for and has not come
lies in the broker's memory: `_pull_chunks` asks for more at once only as long as the line brings it soon.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass
class Pulled:
    """What has come of one snapshot."""

    part: SnapshotAssembly | None = None  # of a pull that was broken off
    whole: Snapshot | None = None  # until it is discarded


class SnapshotSource:
    """Fetches snapshots by version. `staging` is this process's own folder in shared memory."""

    def __init__(self, session: Session, staging: Path, wait_s: float) -> None:
        self._session = session
        self._staging = staging
        self._wait_s = wait_s
        self._newest, self._base = Pulled(), Pulled()  # what was pulled last
        self._num_in_flight = 1

    async def fetch(self, version: int, held_base: str = "") -> Snapshot:
        """The snapshot of `version`, with its base unless that is `held_base`, the digest of the one in the engine.

        Raises SnapshotError if it is not to be had: ask for the newest then.
        """
        answer, manifest = await self._ask(FetchManifest(version=version), f"version {version}")
        base = None
        if manifest.base not in ("", held_base):
            question = FetchManifest(version=version, base=manifest.base)
            of_base, base_manifest = await self._ask(question, f"base {manifest.base[:12]}")
            if base_manifest.digest != manifest.base or base_manifest.base:
                raise SnapshotError(f"version {version} stands beside {manifest.base[:12]}, which is not what was sent")
            base = await self._fetched(of_base, base_manifest, self._base)
        return replace(await self._fetched(answer, manifest, self._newest), base=base)

    async def _ask(self, question: FetchManifest, what: str) -> tuple[ManifestAnswer, Manifest]:
        try:
            answer = await self._session.ask(question, timeout_s=self._wait_s)
        except ProtocolError as error:
            raise SnapshotError(f"{what} is not to be had: {error}") from None
        assert isinstance(answer, ManifestAnswer)
        manifest = Manifest.from_bytes(answer.manifest)
        if manifest.digest != answer.digest:
            raise SnapshotError(f"the manifest of {what} does not match its digest {answer.digest[:12]}")
        return answer, manifest

    async def _fetched(self, answer: ManifestAnswer, manifest: Manifest, pulled: Pulled) -> Snapshot:
        if answer.path:
            try:
                return await asyncio.to_thread(_open, Path(answer.path), answer.version, manifest.digest)
            except SnapshotError as error:  # another user's folder, perhaps; if it is gone, the pull will say so
                log.warning("%s cannot be read in place, pulling it instead: %s", manifest.digest[:12], error)
        return await self._pull(manifest, answer.version, pulled)

    async def discard(self, snapshot: Snapshot) -> None:
        """Free a pulled snapshot and its base once applied; the learner's own files are the learner's to free."""
        for one, pulled in ((snapshot, self._newest), (snapshot.base, self._base)):
            if one is not None and one.folder.parent == self._staging:
                pulled.whole = None
                await asyncio.to_thread(shutil.rmtree, one.folder, ignore_errors=True)

    async def _pull(self, manifest: Manifest, version: int, pulled: Pulled) -> Snapshot:
        if pulled.whole is not None and pulled.whole.digest == manifest.digest:
            return replace(pulled.whole, version=version)
        part = await self._begun(manifest, pulled)
        queue = iter(sorted(part.missing))
        missing, all_chunks = len(part.missing), len(manifest.chunk_digests)
        log.info("pulling version %d, %s: %d of %d chunks", version, manifest.digest[:12], missing, all_chunks)
        failed: Exception | None = None
        self._num_in_flight = 1
        try:
            async with asyncio.TaskGroup() as workers:
                workers.create_task(self._pull_chunks(queue, part, workers))
        except* SnapshotError as errors:
            failed = errors.exceptions[0]
        if failed is not None:  # not raised above: up to Python 3.11.3 it would come out wrapped in a group
            raise failed from None
        pulled.whole = await asyncio.to_thread(part.finish, version)
        pulled.part = None
        return pulled.whole

    async def _begun(self, manifest: Manifest, pulled: Pulled) -> SnapshotAssembly:
        """What has come of these weights so far. What has come of others is of no use any more.

        Making and removing gigabytes takes long, so both are done in a thread.
        """
        if pulled.whole is not None:
            await asyncio.to_thread(shutil.rmtree, pulled.whole.folder, ignore_errors=True)
            pulled.whole = None
        if pulled.part is not None and pulled.part.manifest.digest != manifest.digest:
            await asyncio.to_thread(pulled.part.discard)
            pulled.part = None
        place = self._staging / manifest.digest[:16]
        if pulled.part is None:
            pulled.part = await asyncio.to_thread(SnapshotAssembly, place, manifest)
        return pulled.part

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
