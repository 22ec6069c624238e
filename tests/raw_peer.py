"""A peer without manners: with a good key and both sockets it sends what it likes, and sees what comes back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from protocol.addresses import Addresses
from protocol.codec import Frames, Header, decode
from protocol.keys import read_client_key
from protocol.messages import Hello, Message, Role, Welcome
from protocol.rewards import reward_digest
from protocol.sockets import connect_dealer
from tests.frames import frames_of

IN_FLIGHT = 16  # questions that wait for their answers
WITHIN_S = 60.0  # deadline of all of them


class RawPeer:
    """Synchronous; one answer for each question, in any order."""

    def __init__(self, folder: Path, role: Role, name: str = "raw", addresses: Addresses | None = None) -> None:
        self.role, self.name = role, name
        self.epoch = self.session = 0
        self._reward = f"{folder / 'reward.py'}:score"
        self._sequence = itertools.count(1)
        self._context: zmq.Context[Any] = zmq.Context()
        key = read_client_key(folder / "keys" / f"{role}.key")
        self.sockets = [connect_dealer(self._context, address, key) for address in addresses or Addresses.read(folder)]

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._context.destroy(linger=0)

    def introduction(self, name: str, **fields: Any) -> Hello:
        rewards = reward_digest([self._reward]) if self.role is Role.GENERATOR else ""
        return Hello(**{"role": self.role.value, "name": name, "incarnation": 1, "reward_digest": rewards} | fields)

    def hello(self) -> Welcome:
        answer = self.ask(self.introduction(self.name))
        assert isinstance(answer, Welcome)
        self.session = answer.session
        return answer

    def frames(self, message: Message) -> list[bytes]:
        return frames_of(message, Header(self.epoch, self.session, next(self._sequence)))

    def ask(self, message: Message) -> Message:
        (answer,) = self.ask_all([self.frames(message)])
        self.epoch = answer.header.epoch
        return answer.message

    def ask_all(self, questions: Sequence[list[bytes]], in_flight: int = IN_FLIGHT) -> list[Frames]:
        """Send them, on both sockets in turn, and wait for as many answers."""
        deadline = time.monotonic() + WITHIN_S
        answers: list[Frames] = []
        for number, frames in enumerate(questions):
            self.sockets[number % len(self.sockets)].send_multipart(frames)
            while number + 1 - len(answers) >= in_flight:
                answers += self._arrived(deadline)
        while len(answers) < len(questions):
            answers += self._arrived(deadline)
        return answers

    def _arrived(self, deadline: float) -> list[Frames]:
        poller = zmq.Poller()
        for socket in self.sockets:
            poller.register(socket, zmq.POLLIN)
        ready = poller.poll(max(0.0, 1e3 * (deadline - time.monotonic())))
        assert ready, "the broker owes an answer"
        return [decode(socket.recv_multipart()) for socket, _ in ready]
