"""The broker's poll loop: bytes in, bytes out. It decides nothing; `service.py` and what stands behind it do.

Two ROUTER sockets, so that a heartbeat never waits behind trajectories. The key of every message's sender is checked
against the role that may send it, before the message is unpacked and handed to the service; whatever is wrong with it
is counted and refused in words, and nothing a peer sends can raise past `_serve`. A question that cannot be answered
yet is parked here and tried again when something changed; after PARK_S it is answered with the reason.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zmq

from broker.outcome import Later
from protocol.codec import Frames, Header, decode, encode, read_envelope
from protocol.errors import ProtocolError
from protocol.messages import Message, Over, Refused, Role, VersionHint
from protocol.sockets import AllowList

log = logging.getLogger("tether.broker")

PARK_S = 5.0
TICK_S = 0.25
BURST_S = 0.005  # of one socket before the other gets its turn, at least: what one message costs is up to its sender


class Handler(Protocol):
    """What the server needs of a service."""

    changed: bool
    refused: Counter[str]

    @property
    def epoch(self) -> int: ...

    def handle(
        self, message: Message, header: Header, key: str, role: Role, route: bytes, now: float
    ) -> Message | Later: ...
    def undelivered(self, answer: Message) -> None: ...
    def tick(self, now: float) -> None: ...
    def take_hints(self) -> list[tuple[bytes, VersionHint]]: ...
    def farewells(self) -> list[tuple[bytes, Over]]: ...


@dataclass(eq=False)
class Question:
    """A message and the way back to who sent it."""

    socket: zmq.Socket[Any]
    route: bytes
    key: str
    role: Role
    frames: Frames
    asked_at: float


class Server:
    """Owns the sockets; `run` returns when the service says the run is over or `stop` was called."""

    def __init__(self, control: zmq.Socket[Any], bulk: zmq.Socket[Any], allow: AllowList, service: Handler) -> None:
        self._control, self._bulk, self._allow, self._service = control, bulk, allow, service
        self._parked: dict[
            tuple[str, int], Question
        ] = {}  # by (message type, session): a repeated question replaces the first
        self._retry_s = 0.0  # what it last took to ask again for all that is parked
        self._stopping = False
        self.refused: Counter[str] = Counter()
        service.refused = self.refused

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._control, self._bulk):
            poller.register(socket, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll(0 if self._service.changed else int(TICK_S * 1000)))
            self.turn([socket for socket in (self._control, self._bulk) if socket in ready])
        self._push(self._service.farewells())

    def turn(self, ready: Sequence[zmq.Socket[Any]]) -> None:
        """Serve what has come at these sockets, see to what time brings, and ask again for those who wait."""
        for socket in ready:
            self._drain(socket)
        if self._allow.num_strangers:
            self.refused["stranger"] = self._allow.num_strangers
        self._service.tick(time.monotonic())
        self._retry_parked()
        self._push(self._service.take_hints())

    def _drain(self, socket: zmq.Socket[Any]) -> None:
        """Serve what has come, for as long as who waits takes in turn: of the time at most half is theirs."""
        end = time.monotonic() + max(BURST_S, self._retry_s)
        while time.monotonic() < end:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._serve(socket, parts)

    def _serve(self, socket: zmq.Socket[Any], parts: list[zmq.Frame]) -> None:
        route, payload = parts[0].bytes, [part.buffer for part in parts[1:]]
        sequence = 0
        try:
            key = str(parts[-1].get("User-Id")) if len(parts) > 1 else ""
            role = self._allow.roles.get(key)
            if role is None:
                raise ProtocolError("key", "this key is not listed any more")
            kind, header, _ = read_envelope(payload)
            sequence = header.sequence  # from here on the refusal reaches who asked
            if kind.roles is None or role not in kind.roles:
                raise ProtocolError("role", f"a {role} may not send {kind.__name__}")
            frames = decode(payload)
        except ProtocolError as error:
            self._refuse(socket, route, sequence, error)
        else:
            self._answer(Question(socket, route, key, role, frames, time.monotonic()), overdue=False)

    def _answer(self, question: Question, overdue: bool) -> None:
        """Answer, refuse or park a question; one that is overdue is not parked again."""
        socket, route, (header, message) = question.socket, question.route, question.frames
        try:
            answer = self._service.handle(message, header, question.key, question.role, route, time.monotonic())
            if not isinstance(answer, Later):
                self._send(question, answer)
            elif overdue:
                self._send(question, answer.wait)
            else:
                self._parked[type(message).__name__, header.session] = question
        except ProtocolError as error:
            self._refuse(socket, route, header.sequence, error)
        except Exception as error:  # one message's failure is its sender's; a bug of ours must not take the run down
            log.exception("a %s of %s could not be handled", type(message).__name__, route.hex())
            text = f"{type(error).__name__} in the broker; see its log"
            self._refuse(socket, route, header.sequence, ProtocolError("internal", text))

    def _retry_parked(self) -> None:
        """Ask again what could not be answered, when something changed or time is up."""
        changed, now = self._service.changed, time.monotonic()
        self._service.changed = False
        for place, question in list(self._parked.items()):
            overdue = now - question.asked_at >= PARK_S
            if changed or overdue:
                del self._parked[place]
                self._answer(question, overdue)
        self._retry_s = time.monotonic() - now

    def _push(self, messages: Sequence[tuple[bytes, Message]]) -> None:
        for route, message in messages:
            self._transmit(self._control, route, message, Header(self._service.epoch, 0, 0))

    def _send(self, question: Question, answer: Message) -> None:
        header = Header(self._service.epoch, question.frames.header.session, question.frames.header.sequence)
        if not self._transmit(question.socket, question.route, answer, header):
            self._service.undelivered(answer)

    def _refuse(self, socket: zmq.Socket[Any], route: bytes, sequence: int, error: ProtocolError) -> None:
        self.refused[error.code] += 1
        if self.refused[error.code] <= 5 and error.code != "session":
            log.warning("refused a message (%s): %s", error.code, error.text)
        refusal = Refused(code=error.code[:100], text=error.text[:2000])
        self._transmit(socket, route, refusal, Header(self._service.epoch, 0, sequence))

    def _transmit(self, socket: zmq.Socket[Any], route: bytes, message: Message, header: Header) -> bool:
        """Whether it is on its way; if not, the peer left or does not read, and asks again if it lives."""
        try:
            socket.send_multipart([route, *encode(message, header)], zmq.NOBLOCK, copy=False)
            return True
        except zmq.ZMQError:
            self.refused["unreachable"] += 1
            return False
