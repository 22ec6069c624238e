"""The broker without sockets: a service that is handed messages, and a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.open_run import open_run
from broker.outcome import Later
from broker.service import Service
from protocol.codec import Header, decode, encode
from protocol.config import Config
from protocol.errors import ProtocolError
from protocol.messages import (
    Advance,
    Beat,
    BeatAnswer,
    Done,
    Hello,
    LeaseItem,
    Leases,
    Message,
    Publish,
    Pull,
    Result,
    Role,
    SharePage,
    StatusAnswer,
    StatusRequest,
    Take,
    Verdict,
    Wait,
    Welcome,
)
from protocol.rewards import reward_digest
from protocol.weights import CHUNK_BYTES, Manifest, lay_out
from tests.small_run import make_run

PAST = 10_000.0  # where the clock begins


def manifest(version: int) -> Manifest:
    """Of weights that nobody looks at."""
    layout = lay_out([("w", "float32", (CHUNK_BYTES // 4,))])
    return Manifest(layout, (f"{version:064x}",))


@dataclass(eq=False)
class Peer:
    """One process as the broker sees it: its key, its session, its way of asking."""

    broker: BrokerAlone
    role: Role
    name: str
    incarnation: int = 1
    rank: int = 0
    num_ranks: int = 1
    version: int = 0
    training_step: int = -1
    ledger: bytes = b""
    session: int = 0
    epoch: int = 0

    def introduction(self, **fields: Any) -> Hello:
        given: dict[str, Any] = {
            "role": self.role.value,
            "name": self.name,
            "incarnation": self.incarnation,
            "reward_digest": self.broker.reward_digest if self.role is Role.GENERATOR else "",
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "version": self.version,
            "training_step": self.training_step,
            "ledger": self.ledger,
        }
        return Hello(**given | fields)

    def hello(self, **fields: Any) -> Welcome:
        answer = self.ask(self.introduction(**fields))
        assert isinstance(answer, Welcome)
        self.session, self.epoch = answer.session, self.broker.service.epoch
        return answer

    def ask(self, message: Message, key: str = "") -> Message | Later:
        header = Header(self.epoch, self.session, 1)
        key = key or f"key of {self.role}"
        route = self.name.encode()
        return self.broker.service.handle(message, header, key, self.role, route, self.broker.now)

    def refused(self, message: Message, key: str = "") -> str:
        """The words of the broker's refusal."""
        with pytest.raises(ProtocolError) as caught:
            self.ask(message, key)
        return str(caught.value)

    def refused_hello(self, **fields: Any) -> str:
        return self.refused(self.introduction(**fields))

    # What a learner says

    def publish(self, version: int) -> None:
        made = manifest(version)
        message = Publish(
            version=version, digest=made.digest, manifest=made.to_bytes(), path=f"/v{version}", host="here"
        )
        assert isinstance(self.ask(message), Done)

    def advance(self, version: int, *, skipped: bool = False) -> None:
        assert isinstance(self.ask(Advance(version=version, skipped=skipped)), Done)

    def take(self, step: int, page: int = 0) -> Any:
        answer = self.ask(Take(step=step, rank=self.rank, num_ranks=self.num_ranks, page=page))
        return answer.wait if isinstance(answer, Later) else answer

    def train(self, step: int) -> SharePage:
        """One whole step."""
        page = self.take(step)
        assert isinstance(page, SharePage), page
        self.publish(step + 1)
        self.advance(step + 1)
        return page

    # What a generator says

    def pull(self, version: int, room: int = 1000) -> Leases | Wait:
        answer = self.ask(Pull(version=version, digest=manifest(version).digest, room=room))
        answer = answer.wait if isinstance(answer, Later) else answer
        assert isinstance(answer, Leases | Wait)
        return answer

    def leases(self, version: int, room: int = 1000) -> list[LeaseItem]:
        answer = self.pull(version, room)
        assert isinstance(answer, Leases), answer
        return answer.leases

    def result(self, lease: LeaseItem, sample: int, **fields: Any) -> Result:
        given: dict[str, Any] = {
            "epoch": self.epoch,
            "prompt": lease.number,
            "attempt": lease.attempt,
            "sample": sample,
            "spans": [(lease.version, 0, 3)],
            "reward": float(sample % 2),
            "rewards": {"reward:score": float(sample % 2)},
            "tokens": np.array([5, 6, 0], np.int32),
            "behavior_logprobs": np.full(3, -0.5, np.float32),
            "observed": np.zeros(0, np.bool_),
        }
        return Result(**given | fields)

    def error(self, lease: LeaseItem, sample: int, text: str) -> Result:
        nothing = {"tokens": np.zeros(0, np.int32), "behavior_logprobs": np.zeros(0, np.float32), "spans": []}
        return self.result(lease, sample, error=text, **nothing)

    def deliver(self, message: Result) -> Verdict:
        answer = self.ask(message)
        assert isinstance(answer, Verdict)
        return answer

    def answer(self, lease: LeaseItem) -> None:
        """All samples of a lease."""
        for sample in range(lease.samples):
            assert self.deliver(self.result(lease, sample)).status == "accepted"

    def evaluate(self, version: int) -> None:
        """Answer every lease of the evaluation, and let the others lie."""
        for lease in self.leases(version):
            if lease.kind == "evaluate":
                self.answer(lease)

    # What anybody says

    def beat(self, **fields: Any) -> BeatAnswer:
        answer = self.ask(Beat(**{"state": "at work"} | fields))
        assert isinstance(answer, BeatAnswer)
        return answer

    def status(self) -> dict[str, Any]:
        """As it arrives behind a wire."""
        answer = self.ask(StatusRequest())
        assert isinstance(answer, StatusAnswer)
        arrived = decode([bytes(frame) for frame in encode(answer, Header(1, 1, 1))]).message
        assert isinstance(arrived, StatusAnswer)
        return arrived.status


class BrokerAlone:
    """One run's service. `wait` moves its clock in ticks, as the server would."""

    def __init__(self, folder: Path, prepare: Callable[[Path], None] = lambda folder: None, **sections: Any) -> None:
        self.config: Config = make_run(folder, **sections)
        prepare(folder)
        self.run = open_run(self.config, folder, "here")
        self.service = Service(self.run)
        self.reward_digest = reward_digest([function.use for function in self.config.rewards.functions])
        self.now = PAST

    def peer(self, role: Role, name: str, **fields: Any) -> Peer:
        """A process that has said hello."""
        made = Peer(self, role, name, **fields)
        made.hello()
        return made

    def learner(self, **fields: Any) -> Peer:
        """Rank 0, with its first version published."""
        made = self.peer(Role.LEARNER, "learner-0", **fields)
        made.publish(made.version)
        return made

    def generator(self, name: str = "generator-0", **fields: Any) -> Peer:
        return self.peer(Role.GENERATOR, name, **fields)

    def observer(self) -> Peer:
        return self.peer(Role.STATUS, "status")

    def tick(self) -> None:
        self.service.tick(self.now)

    def wait(self, seconds: float, *alive: Peer, every_s: float = 1.0) -> None:
        """Let time pass; those who are `alive` send heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + every_s)
            for peer in alive:
                peer.beat()
            self.tick()
