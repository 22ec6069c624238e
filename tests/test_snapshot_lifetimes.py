"""How long snapshots stand beside slow, dead and many readers on other hosts, and what those cost the broker."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from actors.snapshot_source import CHUNKS_IN_FLIGHT
from broker.shelf import Shelf
from learner.snapshot_ring import SnapshotRing
from protocol.addresses import Addresses
from protocol.codec import Header, encode
from protocol.messages import Bytes, FetchChunk, FetchManifest, ManifestAnswer, Publish
from protocol.session import Session
from protocol.shared_memory import private_folder
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.weights import CHUNK_BYTES as REAL_CHUNK_BYTES
from protocol.weights import SnapshotWriter, lay_out
from tests.broker_process import BrokerProcess, run_on_disk
from tests.small_run import ScriptedLearner
from tests.tcp_proxy import TcpProxy
from tests.two_hosts import CHUNK_BYTES, TwoHosts, far_session, loaded, through
from tests.wire import wait_until


def occupied(run: TwoHosts) -> tuple[int, int]:
    """How many snapshots lie in the learner's folder, named or not, and their bytes of shared memory."""
    places = list(run.published.parent.iterdir())
    return len(places), sum(512 * (place / WEIGHTS_FILE).stat().st_blocks for place in places)


@pytest.mark.parametrize(("bound", "finishes"), [(2, False), (40, True)])
def test_thirty_versions_beside_a_slow_reader_never_take_more_than_three_snapshots(bound: int, finishes: bool) -> None:
    """A chunk comes in every step, so a pull takes eight: those of no use by then are given up, others are finished."""
    with TwoHosts(num_chunks=8, staleness={"max": bound}, run={"steps": 30}) as run:
        most, begin = (0, 0), run.learner._ring.begin

        def noted(version: int) -> SnapshotWriter:
            nonlocal most
            writer = begin(version)
            most = max(most, occupied(run))
            return writer

        run.learner._ring.begin = noted  # type: ignore[method-assign]
        run.line.down.bytes_per_s = 48 * CHUNK_BYTES
        with run.near_generator() as near, run.far_generator() as far:
            for version in range(30):
                wait_until(lambda v=version: v in loaded(near), "the near one has it, and has let it go")
                due = run.line.down.num_bytes + CHUNK_BYTES
                run.line.release()
                wait_until(lambda v=version, d=due: run.line.down.num_bytes >= d or v in loaded(far), "a chunk")
                run.line.hold()
                assert run.learner.step()
            run.line.release()
            wait_until(lambda: 30 in loaded(far), "it has the newest in the end")
        assert (0 in loaded(far), len(loaded(far)) > 2) == (finishes, finishes)
        assert most[0] == 3
        assert most[1] <= 3 * (8 * CHUNK_BYTES + 4096)


def test_chunks_that_wait_for_slow_readers_keep_no_snapshot() -> None:
    """Each version's reader takes in nothing of what it asked for; no more than three snapshots lie in memory."""
    layout = lay_out([("w", "float32", (4 * CHUNKS_IN_FLIGHT << 18,))])
    shared, shelf = private_folder("test-slow-readers"), Shelf()
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    address = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    readers: list[zmq.Socket[Any]] = []
    try:
        ring = SnapshotRing(shared / "snapshots", layout)
        for version in range(5):
            writer = ring.begin(version)
            assert len(list((shared / "snapshots").iterdir())) <= 3
            writer.view(layout[0])[:] = version
            made = replace(writer.finish(version), data=np.empty(0, np.uint8))  # the learner does not read it
            place = {"path": str(made.folder), "host": "here"}
            publish = Publish(version=version, digest=made.digest, manifest=made.manifest.to_bytes(), **place)
            shelf.put(publish, oldest_useful=version - 2)
            reader = context.socket(zmq.DEALER)
            readers.append(reader)
            reader.setsockopt(zmq.RCVHWM, 1)
            reader.setsockopt(zmq.RCVBUF, 4096)
            reader.connect(address)
            reader.send(b"hello")
            route = router.recv_multipart()[0]
            for index in range(CHUNKS_IN_FLIGHT):
                chunk = Bytes(data=shelf.chunk(made.digest, index, version, 0.0))
                router.send_multipart([route, *encode(chunk, Header(1, version, 1))], zmq.NOBLOCK, copy=False)
    finally:
        context.destroy(linger=0)
        shutil.rmtree(shared)


def test_a_reader_that_dies_without_a_word_holds_nothing_once_it_counts_as_dead() -> None:
    watchdog = {"heartbeat_s": 0.1, "lease_ttl_s": 3.0}
    with (
        TwoHosts(watchdog=watchdog, staleness={"max": 1000}, run={"steps": 0, "epochs": 100.0}) as run,
        run.near_generator(),
        run.far_generator() as far,
    ):
        wait_until(lambda: run.line.down.num_bytes > 5 * CHUNK_BYTES, "a third came")
        run.line.hold()
        pulled = run.published
        for _ in range(2):
            assert run.learner.step()
        assert pulled.exists()
        far.vanish()
        run.line.cut()
        wait_until(lambda: run.learner.step() and not pulled.exists(), "its version is gone")


NUM_READERS = 6


async def read(session: Session, version: int, num_chunks: int) -> None:
    """Ask for every fourth chunk of a version as a pull does, and forget what comes."""
    manifest = await session.ask(FetchManifest(version=version))
    assert isinstance(manifest, ManifestAnswer)

    async def ask(indexes: Iterator[int]) -> None:
        for index in indexes:
            chunk = await session.ask(FetchChunk(digest=manifest.digest, index=index), bulk=True)
            assert isinstance(chunk, Bytes)
            assert len(chunk.data) == REAL_CHUNK_BYTES

    queue = iter(range(0, num_chunks, 4))
    await asyncio.gather(*(ask(queue) for _ in range(CHUNKS_IN_FLIGHT)))


def test_the_brokers_own_memory_grows_neither_with_the_weights_nor_with_versions() -> None:
    """Six slow readers of three versions of 64 MiB: what each has asked for and not got is all that it costs."""
    num_chunks, num_versions = 16, 3
    shared = private_folder("test-broker-memory")
    try:
        folder = shared / "run"
        config = run_on_disk(folder)

        async def scene(broker: BrokerProcess, learner: ScriptedLearner, line: TcpProxy) -> int:
            most = 0
            async with AsyncExitStack() as stack:
                opened = [far_session(folder, config, through(line, folder), f"far-{i}") for i in range(NUM_READERS)]
                sessions = [await stack.enter_async_context(session) for session in opened]
                for version in range(num_versions):
                    if version:
                        learner.version = version
                        await asyncio.to_thread(learner.publish)
                    reading = asyncio.gather(*(read(session, version, num_chunks) for session in sessions))
                    while not reading.done():
                        most = max(most, broker.own_bytes)
                        await asyncio.wait([reading], timeout=0.01)
                    await reading
            return most

        with BrokerProcess(folder) as broker, TcpProxy(Addresses.read(folder).bulk) as line:
            broker.serves()
            size = num_chunks * REAL_CHUNK_BYTES // 4
            with ScriptedLearner(folder, config, size=size) as learner:
                line.down.bytes_per_s = 32 * REAL_CHUNK_BYTES
                before = broker.own_bytes
                most = asyncio.run(scene(broker, learner, line))
    finally:
        shutil.rmtree(shared)
    print(f"the broker's own memory: {before >> 20} MiB alone, {most >> 20} MiB beside {NUM_READERS} readers")
    assert most - before < ((CHUNKS_IN_FLIGHT + 1) * NUM_READERS + 4) * REAL_CHUNK_BYTES
