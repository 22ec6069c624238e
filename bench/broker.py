"""How many results and grants does the broker manage a second, and how long does a ping wait meanwhile?

The real server and service run in this process, on sockets that are lists: nothing is measured but the broker's own
work, from a message's frames to its answer's. First the generators ask for leases until no more are admitted, a few
groups at a time. Then the bulk socket is never empty: results come in without a pause, while every generator has a
pull parked, and asks again when one of its groups is done. A heartbeat every few milliseconds is the ping.

    python bench/broker.py [--repeats 5]

Prints a table and one JSON line. Every figure is the median of the repeats, which are interleaved; about 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from protocol.own_python import use_own_python

    use_own_python()

from broker.server import Server
from protocol.codec import Header, decode, encode
from protocol.messages import Beat, LeaseItem, Leases, Message, Pull, Role
from protocol.sockets import AllowList
from tests.broker_alone import BrokerAlone, Peer, manifest
from tests.lines import Frame, Line, Part, arrived

GROUP_SIZE = 8
AT_A_TIME = 4  # groups that one generator runs
NUM_TOKENS = 200  # of a result
NUM_GROUPS = 400  # that are answered in one turn, at most
LIMIT_S = 10.0  # of one turn
PING_EVERY_S = 0.005
PINGER = b"pinger"


class Size(NamedTuple):
    prompts: int  # P
    staleness: int  # S
    generators: int


SIZES = (Size(64, 2, 16), Size(256, 4, 64), Size(512, 4, 128), Size(1024, 4, 256))


def message_of(peer: Peer, message: Message) -> list[Part]:
    """As the server receives it."""
    return arrived(peer.name.encode(), encode(message, Header(peer.epoch, peer.session, 1)), f"key of {peer.role}")


class PingedLine(Line):
    """A ping falls due every PING_EVERY_S, whether the server looks or not."""

    def __init__(self, ping: list[Part]) -> None:
        super().__init__()
        self._ping = ping
        self.restart()

    def restart(self) -> None:
        self._due = time.monotonic()
        self.pings_s: list[float] = []

    def recv_multipart(self, flags: int, copy: bool) -> list[Part]:
        if time.monotonic() < self._due:
            return super().recv_multipart(flags, copy)
        self._due += PING_EVERY_S
        return self._ping

    def send_multipart(self, parts: Sequence[Frame], flags: int, copy: bool) -> None:
        super().send_multipart(parts, flags, copy)
        if parts[0] == PINGER:
            self.pings_s.append(time.monotonic() - (self._due - PING_EVERY_S))


class BulkLine(Line):
    """Results; after the last one of a group its generator asks for another on the control line."""

    def __init__(self, control: Line) -> None:
        super().__init__()
        self._control = control
        self.pulls: dict[int, list[Part]] = {}  # by number of the result that it follows
        self.num_taken = 0

    def recv_multipart(self, flags: int, copy: bool) -> list[Part]:
        taken = super().recv_multipart(flags, copy)
        if pull := self.pulls.get(self.num_taken):
            self._control.waiting.append(pull)
        self.num_taken += 1
        return taken


class Stage:
    """One broker with its generators, up to date and without leases."""

    def __init__(self, folder: Path, size: Size) -> None:
        batch = {"prompts": size.prompts, "group_size": GROUP_SIZE}
        watchdog = {"lease_ttl_s": 1e6, "warn_s": 1e6, "stop_s": 1e6}
        sampling, staleness = {"max_tokens": NUM_TOKENS}, {"max": size.staleness}
        broker = BrokerAlone(folder, batch=batch, staleness=staleness, sampling=sampling, watchdog=watchdog)
        broker.now = time.monotonic()
        broker.learner()
        self._peers = {peer.name: peer for peer in (broker.generator(f"g{n}") for n in range(size.generators))}
        pinger = broker.generator(PINGER.decode())
        self.control = PingedLine(message_of(pinger, Beat(state="here")))
        self.bulk = BulkLine(self.control)
        allow = AllowList({f"key of {role}": role for role in Role})
        sockets: Any = (self.control, self.bulk)
        self._server, self._sockets = Server(*sockets, allow, broker.service), sockets

    def grant_all(self) -> tuple[dict[str, list[LeaseItem]], float]:
        """Every generator asks until it is refused; the leases by generator, and the server's time."""
        held: dict[str, list[LeaseItem]] = {name: [] for name in self._peers}
        seconds = 0.0
        while True:
            self.control.sent.clear()
            self.control.waiting.extend(self._pull(peer) for peer in self._peers.values())
            seconds += self._serve()
            answers = [(parts[0], decode(parts[1:]).message) for parts in self.control.sent]
            leases = [(route, one) for route, one in answers if isinstance(one, Leases)]
            for route, one in leases:
                held[bytes(route).decode()] += one.leases
            if not leases:
                return held, seconds

    def take_results(self, held: dict[str, list[LeaseItem]], seed: int) -> float:
        """Groups of all generators in a random order, each done with its last sample; the server's time."""
        leases = [(self._peers[name], lease) for name, some in held.items() for lease in some]
        random.Random(seed).shuffle(leases)
        for peer, lease in leases[:NUM_GROUPS]:
            self.bulk.waiting.extend(self._result(peer, lease, sample) for sample in range(GROUP_SIZE))
            self.bulk.pulls[len(self.bulk.waiting) - 1] = self._pull(peer)
        return self._serve()

    def _serve(self) -> float:
        started = time.monotonic()
        self.control.restart()
        while (self.control.waiting or self.bulk.waiting) and time.monotonic() - started < LIMIT_S:
            self._server.turn(self._sockets)
        return time.monotonic() - started

    def _pull(self, peer: Peer) -> list[Part]:
        return message_of(peer, Pull(version=0, digest=manifest(0).digest, room=AT_A_TIME * GROUP_SIZE))

    def _result(self, peer: Peer, lease: LeaseItem, sample: int) -> list[Part]:
        tokens, logprobs = np.full(NUM_TOKENS, 5, np.int32), np.full(NUM_TOKENS, -0.5, np.float32)
        spans = [(0, 0, NUM_TOKENS)]
        return message_of(peer, peer.result(lease, sample, tokens=tokens, behavior_logprobs=logprobs, spans=spans))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one size, in one turn or as the median of several."""

    results_per_s: float
    grants_per_s: float
    ping_ms: float  # median
    worst_ping_ms: float


def measure(size: Size, seed: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder) / "run", size)
        held, grant_s = stage.grant_all()
        result_s = stage.take_results(held, seed)
    pings_s, num_leases = stage.control.pings_s, sum(map(len, held.values()))
    assert num_leases == size.prompts * (size.staleness + 1), f"{num_leases} leases"
    results_per_s, grants_per_s = stage.bulk.num_taken / result_s, num_leases / grant_s
    return Figures(results_per_s, grants_per_s, 1e3 * median(pings_s), 1e3 * max(pings_s))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    turns = [{size: measure(size, seed) for size in SIZES} for seed in range(args.repeats)]
    print("prompts    S  generators  results/s  grants/s  ping ms  worst")
    runs = []
    for size in SIZES:
        columns = zip(*(astuple(turn[size]) for turn in turns), strict=True)
        found = Figures(*(round(median(column), 1) for column in columns))
        runs.append(size._asdict() | asdict(found))
        rates = f"{found.results_per_s:9.0f}  {found.grants_per_s:8.0f}"
        pings = f"{found.ping_ms:7.1f}  {found.worst_ping_ms:5.0f}"
        print(f"{size.prompts:7}  {size.staleness:3}  {size.generators:10}  {rates}  {pings}")
    print(json.dumps({"bench": "broker", "repeats": args.repeats, "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
