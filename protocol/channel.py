"""One DEALER socket with requests and answers: every request has a deadline, and is repeated until it is answered.

Used by generators, learner ranks and tools, inside an asyncio loop. One task reads; nobody cancels a receive (that
can lose a message), only the future that waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from protocol.codec import Frames, Header, decode, encode
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import ClientKey
from protocol.messages import Message
from protocol.sockets import connect_dealer

log = logging.getLogger("tether.channel")

REPEAT_S = 6.0  # a parked request is answered after 5 s at the latest, so silence beyond that means a loss
RENEW_S = 18.0  # after so much silence the socket is replaced: there may be a new peer behind a dead connection


class Channel:
    """A connection to one of the broker's sockets. Not thread-safe: it belongs to one event loop."""

    def __init__(self, address: str, key: ClientKey, on_push: Callable[[Frames], None] | None = None) -> None:
        self.address = address
        self._key = key
        self._on_push = on_push
        self._context = zmq.asyncio.Context.instance()
        self._sequence = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Frames]] = {}
        self._connect()

    async def request(self, message: Message, *, epoch: int, session: int, timeout_s: float, what: str) -> Frames:
        """The answer to `message`. Raises PeerTimeout naming `what` was waited for."""
        sequence = next(self._sequence)
        frames = encode(message, Header(epoch, session, sequence))
        answer: asyncio.Future[Frames] = asyncio.get_running_loop().create_future()
        self._waiting[sequence] = answer
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        try:
            while True:
                await self._send(frames, deadline)
                done, _ = await asyncio.wait([answer], timeout=max(0.0, min(REPEAT_S, deadline - clock())))
                if done:
                    return answer.result()
                if clock() >= deadline:
                    raise PeerTimeout(
                        f"waited {timeout_s:.0f} s for {what} from the broker at {self.address}, no answer came"
                    )
                if clock() - self._heard_at >= RENEW_S:
                    self._reconnect()
        finally:
            self._waiting.pop(sequence, None)

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close(linger=0)

    def _connect(self) -> None:
        self._socket = connect_dealer(self._context, self.address, self._key)
        self._heard_at = asyncio.get_running_loop().time()  # or made anew, so that many requests do not take turns
        self._reader = asyncio.get_running_loop().create_task(self._read(self._socket))

    def _reconnect(self) -> None:
        log.info("nothing heard from %s for %.0f s: connecting anew", self.address, RENEW_S)
        self._reader.cancel()
        self._socket.close(linger=0)
        self._connect()

    async def _send(self, frames: list[bytes | memoryview], deadline: float) -> None:
        left = deadline - asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError, zmq.ZMQError):  # not sent is the same as lost: it is repeated
            async with asyncio.timeout(max(0.01, min(REPEAT_S, left))):
                await self._socket.send_multipart(frames)

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            try:
                frames = decode(await socket.recv_multipart())
            except ProtocolError as error:
                log.warning("dropped a malformed message from %s: %s", self.address, error)
                continue
            except zmq.ZMQError:
                return  # the socket was replaced
            self._heard_at = asyncio.get_running_loop().time()
            waiting = self._waiting.get(frames.header.sequence)
            if waiting is not None and not waiting.done():
                waiting.set_result(frames)
            elif frames.header.sequence == 0 and self._on_push is not None:
                self._on_push(frames)
