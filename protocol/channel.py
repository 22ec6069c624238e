"""One DEALER socket with requests and answers: every request has a deadline, and is repeated until it is answered.

Used by generators, learner ranks and tools, inside an asyncio loop. One task reads; nobody cancels a receive (that
can lose a message), only the future that waits for it. What was asked is lost when its connection broke or when the
broker has answered what was asked later, since it answers in order; silence alone says nothing, for one answer may be
under way for long. That a slow line is never filled with answers to repeated requests rests on `_answered`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from protocol.codec import Frames, Header, decode, encode
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import ClientKey
from protocol.messages import Message
from protocol.sockets import connect_dealer

log = logging.getLogger("tether.channel")

REPEAT_S = 6.0  # a parked request is answered after 5 s at the latest; this often we look whether it was lost
RENEW_S = 18.0  # after so much silence the socket is replaced: there may be a new peer behind a dead connection


@dataclass(eq=False)
class _Request:
    """A question that waits for its answer."""

    answer: asyncio.Future[Frames]
    place: int = 0  # in the order in which questions were sent; 0: it was not


class Channel:
    """A connection to one of the broker's sockets. Not thread-safe: it belongs to one event loop."""

    def __init__(self, address: str, key: ClientKey, on_push: Callable[[Frames], None] | None = None) -> None:
        self.address = address
        self._key = key
        self._on_push = on_push
        self._context = zmq.asyncio.Context.instance()
        self._sequence = itertools.count(1)
        self._waiting: dict[int, _Request] = {}
        self._sent = 0  # questions so far, repeated ones too
        self._answered = 0  # what was sent up to this place and has no answer was lost
        self._connect()

    async def request(self, message: Message, *, epoch: int, session: int, timeout_s: float, what: str) -> Frames:
        """The answer to `message`. Raises PeerTimeout naming `what` was waited for."""
        sequence = next(self._sequence)
        frames = encode(message, Header(epoch, session, sequence))
        request = self._waiting[sequence] = _Request(asyncio.get_running_loop().create_future())
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        deadline = asked_at + timeout_s
        try:
            while True:
                if request.place <= self._answered:
                    await self._send(request, frames, deadline)
                done, _ = await asyncio.wait([request.answer], timeout=max(0.0, min(REPEAT_S, deadline - clock())))
                if done:
                    return request.answer.result()
                if clock() >= deadline:
                    raise PeerTimeout(
                        f"waited {timeout_s:.0f} s for {what} from the broker at {self.address}, no answer came"
                    )
                if clock() - max(self._heard_at, asked_at) >= RENEW_S:
                    self._reconnect()
        finally:
            self._waiting.pop(sequence, None)

    async def close(self) -> None:
        tasks = self._reader, self._watcher
        self._disconnect()
        await asyncio.wait(tasks)

    def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._socket = connect_dealer(self._context, self.address, self._key)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._heard_at = loop.time()  # or made anew, so that many requests do not take turns
        self._answered = self._sent  # what the socket before was asked, nobody will answer
        self._reader = loop.create_task(self._read(self._socket))
        self._watcher = loop.create_task(self._watch(self._monitor))

    def _disconnect(self) -> None:
        self._reader.cancel()
        self._watcher.cancel()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _reconnect(self) -> None:
        log.info("nothing heard from %s for %.0f s: connecting anew", self.address, RENEW_S)
        self._disconnect()
        self._connect()

    async def _send(self, request: _Request, frames: list[bytes | memoryview], deadline: float) -> None:
        self._sent += 1
        request.place = self._sent
        sending = self._socket.send_multipart(frames)
        try:  # waited for, not awaited: replacing the socket cancels what it has not sent, which must not cancel us
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait([sending], timeout=max(0.01, min(REPEAT_S, left)))
        finally:
            sending.cancel()
        if sending.cancelled() or sending.exception() is not None:
            request.place = 0  # not sent is the same as lost: it is repeated

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
            request = self._waiting.get(frames.header.sequence)
            if request is not None and not request.answer.done():
                self._answered = max(self._answered, request.place)
                request.answer.set_result(frames)
            elif frames.header.sequence == 0 and self._on_push is not None:
                self._on_push(frames)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the socket was replaced
            while True:
                await monitor.recv_multipart()
                self._answered = self._sent  # what went through that connection; the next one is made by itself
