"""Sockets that are lists: what the server receives and sends without a wire, in the same thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

Frame = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a message as it comes out of a socket."""

    buffer: Frame
    key: str

    @property
    def bytes(self) -> bytes:
        return bytes(self.buffer)

    def get(self, name: str) -> str:
        """What the authenticator says of the sender, whatever it is called."""
        return self.key


def arrived(route: bytes, frames: Sequence[Frame], key: str) -> list[Part]:
    """A message from the peer behind this route."""
    return [Part(part, key) for part in (route, *frames)]


class Line:
    """What waits to be received, and what was sent: route and frames, in order."""

    def __init__(self) -> None:
        self.waiting: deque[list[Part]] = deque()
        self.sent: list[Sequence[Frame]] = []

    def recv_multipart(self, flags: int, copy: bool) -> list[Part]:
        if not self.waiting:
            raise zmq.Again
        return self.waiting.popleft()

    def send_multipart(self, parts: Sequence[Frame], flags: int, copy: bool) -> None:
        self.sent.append(parts)
