"""The cluster command's line to its broker: asks for the status all the time, and once to end the run in order."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from protocol.addresses import Addresses, host_identity
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import read_client_key
from protocol.messages import Drain, Hello, Message, Role, StatusAnswer, StatusRequest
from protocol.session import Session

ASK_EVERY_S = 1.0
ANSWER_S = 5.0


class BrokerLine:
    """`follow` until cancelled; `drain` at any time. A broker that is away is asked again until it is back."""

    def __init__(self, run_dir: Path, name: str, answered: Callable[[Mapping[str, Any]], None]) -> None:
        self._run_dir, self._name, self._answered = run_dir, name, answered
        self._incarnation = secrets.randbits(62)
        self._session: Session | None = None
        self._drain: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        """Report every status; {} when the broker does not answer."""
        while True:
            try:
                status = await self.status()
            except (PeerTimeout, ProtocolError):
                status = {}
            with contextlib.suppress(OSError):  # a full disk must not take the screen down; the next status tries again
                self._answered(status)
            await asyncio.sleep(ASK_EVERY_S)

    async def status(self, timeout_s: float = ANSWER_S) -> Mapping[str, Any]:
        """Raises PeerTimeout or ProtocolError if the broker is silent or refuses us."""
        answer = await self._ask(StatusRequest(), timeout_s)
        assert isinstance(answer, StatusAnswer)
        return answer.status

    def drain(self) -> None:
        """Ask for the end of the run, in the background, until the broker has heard it."""
        self._drain = asyncio.get_running_loop().create_task(self._ask_to_drain())

    async def close(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
        if self._session is not None:
            await self._session.close(farewell="")

    async def _ask_to_drain(self) -> None:
        while True:
            try:
                await self._ask(Drain(reason="Ctrl-C"), ANSWER_S)
                return
            except (PeerTimeout, ProtocolError):
                await asyncio.sleep(ASK_EVERY_S)

    async def _ask(self, message: Message, timeout_s: float) -> Message:
        if self._session is None:
            key = read_client_key(self._run_dir / "keys" / "status.key")
            self._session = await Session.open(Addresses.read(self._run_dir), key, self._hello, timeout_s=timeout_s)
        return await self._session.ask(message, timeout_s=timeout_s)

    def _hello(self) -> Hello:
        return Hello(role=Role.STATUS.value, name=self._name, incarnation=self._incarnation, host=host_identity())
