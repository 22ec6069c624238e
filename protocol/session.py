"""A peer's standing with the broker: it introduces itself, keeps the epoch, and introduces itself again after a
restart.

Everybody but the broker uses it. Whoever holds a Session never handles reconnects: a request that meets a restarted
broker says hello again and is repeated under the new epoch. `on_epoch` tells the holder that everything it was given
before is void.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from protocol.addresses import Addresses
from protocol.channel import Channel
from protocol.codec import Frames
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import ClientKey
from protocol.messages import Bye, Hello, Message, Over, Refused, VersionHint, Welcome


class Session:
    """Open with `Session.open`; ask with `ask`. Belongs to one event loop."""

    def __init__(self, addresses: Addresses, key: ClientKey, hello: Callable[[], Hello]) -> None:
        self.epoch = 0
        self.welcome: Welcome | None = None
        self.on_epoch: Callable[[int], None] = lambda epoch: None
        self.on_hint: Callable[[VersionHint], None] = lambda hint: None
        self.on_over: Callable[[str], None] = lambda reason: None
        self._hello = hello
        self._control = Channel(addresses.control, key, self._pushed)
        self._bulk = Channel(addresses.bulk, key)
        self._greeting = asyncio.Lock()

    @classmethod
    async def open(
        cls, addresses: Addresses, key: ClientKey, hello: Callable[[], Hello], *, timeout_s: float = 60.0
    ) -> Session:
        """Connect and introduce ourselves.

        Raises ProtocolError if the broker refuses us, PeerTimeout if it is silent.
        """
        session = cls(addresses, key, hello)
        try:
            await session.greet(timeout_s)
        except BaseException:
            await session.close(farewell="")
            raise
        return session

    async def ask(self, message: Message, *, timeout_s: float = 60.0, bulk: bool = False, what: str = "") -> Message:
        """The broker's answer. Raises ProtocolError when it refuses, PeerTimeout when it stays silent."""
        what = what or f"an answer to {type(message).__name__}"
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            assert self.welcome is not None, "ask() before open()"
            channel = self._bulk if bulk else self._control
            session = self.welcome.session
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                raise PeerTimeout(f"waited {timeout_s:.0f} s for {what}, the broker kept restarting")
            frames = await channel.request(message, epoch=self.epoch, session=session, timeout_s=left, what=what)
            answer = frames.message
            if isinstance(answer, Refused):
                if answer.code != "session":
                    raise ProtocolError(answer.code, answer.text)
            elif frames.header.epoch == self.epoch:
                return answer
            else:
                continue  # another request has met a restarted broker meanwhile: what the old one said is void
            if session == self.welcome.session:
                await self.greet(left)

    async def close(self, farewell: str = "done") -> None:
        """Leave in order: with a farewell our leases count nothing against their prompts."""
        if farewell and self.welcome is not None:
            with contextlib.suppress(PeerTimeout, ProtocolError):  # the broker will notice by itself
                await self.ask(Bye(reason=farewell), timeout_s=2.0)
        await self._control.close()
        await self._bulk.close()

    async def greet(self, timeout_s: float) -> None:
        """Say hello, unless another request is doing so. Raises ProtocolError if we are refused."""
        known = self.welcome
        async with self._greeting:
            if self.welcome is not known:
                return  # another request has greeted meanwhile
            frames = await self._control.request(
                self._hello(), epoch=0, session=0, timeout_s=timeout_s, what="the broker's welcome"
            )
            answer = frames.message
            if isinstance(answer, Refused):
                raise ProtocolError(answer.code, answer.text)
            if not isinstance(answer, Welcome):
                raise ProtocolError("hello", f"expected Welcome, got {type(answer).__name__}")
            self.welcome = answer
            changed = frames.header.epoch != self.epoch
            self.epoch = frames.header.epoch
        if changed:
            self.on_epoch(self.epoch)

    def _pushed(self, frames: Frames) -> None:
        if isinstance(frames.message, VersionHint) and frames.header.epoch == self.epoch:
            self.on_hint(frames.message)
        elif isinstance(frames.message, Over):
            self.on_over(frames.message.reason)
