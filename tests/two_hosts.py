"""A run over two hosts: broker and learner on this one, and one that shares no memory with them.

What the far host pulls comes through a line that a test breaks (tests/tcp_proxy.py). Sockets, keys, broker, generators
and snapshots are the product's.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.fake_engine import FakeEngine
from actors.snapshot_source import SnapshotSource
from broker.service import Service
from broker.shelf import Shelved
from protocol.addresses import Addresses
from protocol.config import Config
from protocol.keys import read_client_key
from protocol.messages import Beat, Hello, Role
from protocol.rewards import reward_digest
from protocol.session import Session
from protocol.shared_memory import private_folder
from protocol.snapshot_file import Bytes
from protocol.weights import Snapshot
from tests.engines import until
from tests.small_run import FakeGenerator, ScriptedLearner, broker, make_run
from tests.tcp_proxy import TcpProxy

CHUNK_BYTES = 1 << 20  # the least that a manifest may have
REPEAT_S = 0.5  # what was lost is asked again sooner than in life
PATIENT = {"heartbeat_s": 0.2, "lease_ttl_s": 60.0}
HOST = "another host"


class Loads(FakeEngine):
    """Remembers the versions that it loaded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loaded: list[int] = []

    async def _swap(self, snapshot: Snapshot, requests: Any) -> None:
        await super()._swap(snapshot, requests)
        self.loaded.append(snapshot.version)


class ChunkLog:
    """The chunks that a broker was asked for, in order; it answers as before."""

    def __init__(self, service: Service) -> None:
        self.asked: list[int] = []
        self._chunk = service._run.shelf.chunk
        service._run.shelf.chunk = self._noted  # type: ignore[method-assign]

    def _noted(self, digest: str, index: int, reader: int, now: float) -> Bytes:
        self.asked.append(index)
        return self._chunk(digest, index, reader, now)

    @property
    def num_repeated(self) -> int:
        """How often a chunk was asked for again."""
        return len(self.asked) - len(set(self.asked))


class TwoHosts:
    """From `with` to its end; version 0, of `num_chunks`, is published when it begins.

    With `num_base_chunks` versions are adapters.
    """

    def __init__(self, num_chunks: int = 16, num_base_chunks: int = 0, **sections: Any) -> None:
        self.num_chunks, self.num_base_chunks = num_chunks, num_base_chunks
        self._sections = {"watchdog": PATIENT} | sections

    def __enter__(self) -> TwoHosts:
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr("protocol.weights.CHUNK_BYTES", CHUNK_BYTES)
            patch.setattr("protocol.channel.REPEAT_S", REPEAT_S)
            shared = private_folder("test-two-hosts")
            stack.callback(shutil.rmtree, shared)
            self.folder = shared / "run"
            self.config = make_run(self.folder, **self._sections)
            self.line = stack.enter_context(TcpProxy(Addresses.read(self.folder).bulk))
            self._broker = stack.enter_context(ExitStack())
            self._start_broker()
            size, base_size = (number * CHUNK_BYTES // 4 for number in (self.num_chunks, self.num_base_chunks))
            learner = ScriptedLearner(self.folder, self.config, size=size, base_size=base_size)
            self.learner = stack.enter_context(learner)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def restart_broker(self) -> None:
        """As after a crash: it says nothing, and another at the same addresses knows nothing. `log` begins anew."""
        self._service.farewells = list  # type: ignore[method-assign, assignment]
        self._broker.close()
        self._start_broker()

    @property
    def newest(self) -> Shelved:
        announced = self._service._run.announced
        assert announced is not None
        return announced

    @property
    def published(self) -> Path:
        """The folder of the newest version."""
        return Path(self.newest.path)

    def near_generator(self) -> FakeGenerator:
        return FakeGenerator(self.folder, self.config, "near", engine_type=Loads)

    def far_generator(self) -> FakeGenerator:
        addresses = self._addresses()
        return FakeGenerator(self.folder, self.config, "far", host=HOST, addresses=addresses, engine_type=Loads)

    @asynccontextmanager
    async def puller(self, name: str = "far") -> AsyncIterator[SnapshotSource]:
        """A far generator's source of snapshots, without the generator."""
        async with far_session(self.folder, self.config, self._addresses(), name) as session:
            staging = self.folder / f"staging-{name}"
            staging.mkdir(mode=0o700)
            yield SnapshotSource(session, staging, wait_s=60.0)

    def pull(self, fault: Callable[[SnapshotSource], Any] | None = None, after: int = 5) -> None:
        """One pull of version 0, with a fault after so many chunks; its copy is what the learner wrote."""

        async def scene() -> None:
            async with self.puller() as source:
                pulling = asyncio.create_task(source.fetch(0))
                if fault is not None:
                    await until(lambda: self.line.down.num_bytes > after * CHUNK_BYTES, f"{after} chunks came")
                    await asyncio.to_thread(fault, source)
                self.check(await pulling)

        asyncio.run(scene())

    def check(self, copy: Snapshot) -> None:
        copy.verify()
        assert copy.digest == self.newest.digest

    def _start_broker(self) -> None:
        self._service = self._broker.enter_context(broker(self.folder, self.config))
        self.log = ChunkLog(self._service)

    def _addresses(self) -> Addresses:
        return through(self.line, self.folder)


def through(line: TcpProxy, folder: Path) -> Addresses:
    """The broker's addresses, with the line to its bulk socket."""
    return Addresses(Addresses.read(folder).control, line.address)


@asynccontextmanager
async def far_session(folder: Path, config: Config, addresses: Addresses, name: str) -> AsyncIterator[Session]:
    """A far generator's standing with the broker, kept up by heartbeats."""
    digest = reward_digest([function.use for function in config.rewards.functions])
    key = read_client_key(folder / "keys" / "generator.key")

    def hello() -> Hello:
        return Hello(role=Role.GENERATOR.value, name=name, incarnation=1, host=HOST, reward_digest=digest)

    session = await Session.open(addresses, key, hello, timeout_s=10.0)
    beating = asyncio.create_task(_beat(session))
    try:
        yield session
    finally:
        beating.cancel()
        await session.close()


def loaded(generator: FakeGenerator) -> list[int]:
    """The versions that its engine has loaded so far."""
    return generator.engine.loaded if isinstance(generator.engine, Loads) else []


async def _beat(session: Session) -> None:
    assert session.welcome is not None
    while True:
        await session.ask(Beat(state="pulling"))
        await asyncio.sleep(session.welcome.heartbeat_s)
