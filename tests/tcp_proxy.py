"""A TCP line that can be broken in every way a real one can: a proxy between a peer and the broker, in a thread.

    with TcpProxy("tcp://127.0.0.1:5555") as line:   # who is to suffer connects to line.address
        line.down.cut_at.append(10_000_000)          # all connections break after so many bytes from the target
        line.hold(); ...; line.release()             # a partition without a word: nothing is refused, nothing arrives

It knows nothing of what it carries. Faults are set from any thread and may be set at any time; what `up` and `down`
count is what was delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

READ_BYTES = 1 << 16
NUM_READS = 64  # under way in one direction of a connection: what a delayed line holds
ANSWER_S = 10.0


@dataclass(eq=False)
class Flow:
    """One direction of the line, over all of its connections."""

    num_bytes: int = 0  # delivered so far
    bytes_per_s: float = math.inf  # of all connections together
    delay_s: float = 0.0
    cut_at: list[int] = field(default_factory=list)  # ascending: whenever `num_bytes` gets there, all is cut
    flip_at: list[int] = field(default_factory=list)  # ascending: the lowest bit of each of these bytes is flipped
    free_at: float = 0.0  # when the line can take the next bytes


class _Connection:
    """A peer and its connection to the target."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.ends = (near, far)
        self.stranded = False
        self.flows = asyncio.Event()

    def cut(self) -> None:
        """Both ends see a reset; what is under way is lost."""
        for end in self.ends:
            end.transport.abort()


class TcpProxy:
    """Listens at `address` from `with` to its end."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self.up, self.down = Flow(), Flow()  # towards the target, and from it
        self.num_connections = 0  # that were made so far
        self.accepts = True  # False: whoever connects is cut at once
        self._holds = False
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(ANSWER_S)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(ANSWER_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive()
        self._loop.close()

    def cut(self) -> None:
        """Reset every connection of now; new ones may be made."""
        self._do(self._cut)

    def hold(self) -> None:
        """Forward nothing, on no connection, until `release`: what was sent by then is delivered then."""
        self._do(lambda: self._set_holds(True))

    def release(self) -> None:
        self._do(lambda: self._set_holds(False))

    def strand(self) -> None:
        """The connections of now stay open and never deliver anything again; new ones do."""
        self._do(self._strand)

    def _do(self, act: Callable[[], None]) -> None:
        """In the loop's thread, and done when this returns."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(act)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(ANSWER_S)

    def _cut(self) -> None:
        for connection in self._connections:
            connection.cut()

    def _set_holds(self, holds: bool) -> None:
        self._holds = holds
        for connection in self._connections:
            self._open_or_close(connection)

    def _strand(self) -> None:
        for connection in self._connections:
            connection.stranded = True
            self._open_or_close(connection)

    def _open_or_close(self, connection: _Connection) -> None:
        if self._holds or connection.stranded:
            connection.flows.clear()
        else:
            connection.flows.set()

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            if not self.accepts:
                raise ConnectionRefusedError
            answers, far = await asyncio.open_connection(*self._target)
        except OSError:  # nobody listens there: the peer finds nobody either
            near.transport.abort()
            return
        connection = _Connection(near, far)
        self.num_connections += 1
        self._connections.add(connection)
        self._open_or_close(connection)
        pumps = [
            asyncio.create_task(self._pump(connection, self.up, reader, far)),
            asyncio.create_task(self._pump(connection, self.down, answers, near)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(connection)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in connection.ends:
                end.close()

    async def _pump(
        self, connection: _Connection, flow: Flow, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Until one end has closed its side, or the connection is cut."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(NUM_READS)
        reading = asyncio.create_task(self._read(flow, source, under_way))
        try:
            while True:
                due_at, data = await under_way.get()
                if not data:
                    return
                await asyncio.sleep(due_at - self._loop.time())
                await connection.flows.wait()
                await self._deliver(flow, bytearray(data), sink)
        finally:
            reading.cancel()

    async def _read(
        self, flow: Flow, source: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        data = b"first"
        while data:
            try:
                data = await source.read(READ_BYTES)
            except OSError:
                data = b""
            await under_way.put((self._loop.time() + flow.delay_s, data))

    async def _deliver(self, flow: Flow, data: bytearray, sink: asyncio.StreamWriter) -> None:
        if math.isfinite(flow.bytes_per_s):
            flow.free_at = max(flow.free_at, self._loop.time()) + len(data) / flow.bytes_per_s
            await asyncio.sleep(flow.free_at - self._loop.time())
        start, end = flow.num_bytes, flow.num_bytes + len(data)
        while flow.flip_at and flow.flip_at[0] < end:
            data[flow.flip_at.pop(0) - start] ^= 1
        cuts = bool(flow.cut_at) and flow.cut_at[0] <= end
        if cuts:
            del data[flow.cut_at.pop(0) - start :]
        flow.num_bytes += len(data)
        with contextlib.suppress(OSError):  # its reader notices as well
            sink.write(data)
            await sink.drain()
        if cuts:
            self._cut()

    async def _end(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.flows.set()
        self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=ANSWER_S / 2)
