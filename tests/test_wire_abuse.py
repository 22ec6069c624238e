"""A broker process under attack: by who holds a good key and sends broken messages, and by who holds none.

Beside the attack an honest peer pings all the time (tests/pinger.py). What a ping may take is 50 ms; on a machine with
fewer cores than processes it also takes what the broker, or the peer, waits for a core. How long that was is measured
at the same time by a thread that only sleeps, and allowed to the single worst ping on top.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from protocol.addresses import Addresses
from protocol.codec import MAX_QUESTION_BYTES, Frames
from protocol.keys import ClientKey, read_client_key, read_server_key
from protocol.messages import (
    Advance,
    Beat,
    Bye,
    Bytes,
    Drain,
    Evaluate,
    FetchChunk,
    FetchFile,
    FetchManifest,
    LeaseItem,
    Leases,
    ManifestAnswer,
    Message,
    Publish,
    Pull,
    Refused,
    Release,
    Result,
    Role,
    StatusAnswer,
    StatusRequest,
    Take,
    Verdict,
    Welcome,
)
from protocol.sockets import connect_dealer
from protocol.weights import CHUNK_BYTES
from tests.broker_process import BrokerProcess, run_on_disk
from tests.frames import damaged, repaired, undermined
from tests.pinger import Latencies, Pinger
from tests.raw_peer import IN_FLIGHT, RawPeer
from tests.small_run import ScriptedLearner
from tests.wire import wait_until

PING_S = 0.050
HEAVY_PING_S = 0.200  # while each message, or the kernel's refusal of each connection, takes a core for milliseconds
GROUPS, SAMPLES = 4, 3  # of a batch: what the honest generator holds
MORE_MEMORY = 16 << 20  # bytes that a broker may keep of an attack: buffers of the allocator, not messages


def held(peer: RawPeer, pulled: Pull) -> list[LeaseItem]:
    answer = peer.ask(pulled)
    assert isinstance(answer, Leases), answer
    return answer.leases


def result_of(peer: RawPeer, lease: LeaseItem, sample: int, **fields: Any) -> Result:
    given: dict[str, Any] = {
        "epoch": peer.epoch,
        "prompt": lease.number,
        "attempt": lease.attempt,
        "sample": sample,
        "spans": [(0, 0, 2), (0, 2, 3)],
        "reward": 0.5,
        "rewards": {"reward:score": 0.5},
        "tokens": np.array([5, 6, 0], np.int32),
        "behavior_logprobs": np.full(3, -0.5, np.float32),
        "observed": np.zeros(0, np.bool_),
    }
    return Result(**given | fields)


class Siege:
    """A run in the middle of its first batch, with attackers that hold a generator's key inside and out."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        config = run_on_disk(folder, watchdog={"lease_ttl_s": 600.0}, run={"steps": 4})
        self.broker = stack.enter_context(BrokerProcess(folder))
        self.broker.serves()
        self.learner = stack.enter_context(ScriptedLearner(folder, config, size=CHUNK_BYTES // 4))
        self.honest = stack.enter_context(RawPeer(folder, Role.GENERATOR, "honest"))
        self.liar = stack.enter_context(RawPeer(folder, Role.GENERATOR, "liar"))  # its messages are well made
        self.vandal = stack.enter_context(RawPeer(folder, Role.GENERATOR, "vandal"))  # its messages are broken
        self.observer = stack.enter_context(RawPeer(folder, Role.STATUS))
        for peer in (self.honest, self.liar, self.vandal, self.observer):
            peer.hello()
        manifest = self.honest.ask(FetchManifest(version=0))
        assert isinstance(manifest, ManifestAnswer)
        self.pull = Pull(version=0, digest=manifest.digest, room=GROUPS * SAMPLES)
        self.leases = held(self.honest, self.pull)
        self.honest.ask(FetchChunk(digest=manifest.digest, index=0))  # what the first chunk opens stays open
        (self.stolen,) = held(self.vandal, self.pull.model_copy(update={"room": SAMPLES}))
        self._unanswered = [(lease, sample) for lease in self.leases for sample in range(SAMPLES)]
        self.pinger = stack.enter_context(Pinger(folder))

    def answer_one(self) -> None:
        """The honest generator goes on."""
        answer = self.honest.ask(result_of(self.honest, *self._unanswered.pop()))
        assert answer == Verdict(status="accepted"), answer

    def finish(self) -> list[int]:
        """The prompts of the batch that comes of it."""
        while self._unanswered:
            self.answer_one()
        assert self.learner.step()
        return self.learner.prompts

    def status(self) -> dict[str, Any]:
        answer = self.observer.ask(StatusRequest())
        assert isinstance(answer, StatusAnswer)
        return answer.status

    @contextmanager
    def attack(self, what: str, limit_s: float = PING_S, more_memory: int = MORE_MEMORY) -> Iterator[Counter[str]]:
        """Whatever happens inside changes nothing but the counters of what was refused, which it returns."""
        before, refused = self.status(), Counter[str]()
        descriptors = self.broker.num_descriptors + 1  # weights are open while somebody pulls them
        memory, began = self.broker.rss_bytes, time.monotonic()
        yield refused
        latencies = self.pinger.between(began, time.monotonic())
        after = self.status()
        wait_until(lambda: self.broker.num_descriptors <= descriptors, "the end of the attackers' connections")
        grown = self.broker.rss_bytes - memory
        refused.update(Counter(after["refused"]) - Counter(before["refused"]))
        print(f"\n{what}: {latencies}; memory +{grown / 1e6:.1f} MB; {dict(refused)}")
        assert lasting(after) == lasting(before)
        assert "Traceback" not in self.broker.log
        assert not refused["internal"]
        assert grown < more_memory
        assert_swift(latencies, limit_s)
        self.answer_one()


def assert_swift(latencies: Latencies, limit_s: float = PING_S) -> None:
    assert latencies.p99 < limit_s, latencies
    assert latencies.worst < limit_s + 2 * latencies.jitter, latencies  # the pinger's own, and as much of the broker's


def lasting(status: Any) -> Any:
    """What is left of a status without what time alone changes, and without what attackers say of themselves."""
    if isinstance(status, dict):
        passing = ("refused", "results", "processes", "metrics")
        return {
            name: lasting(value) for name, value in status.items() if not name.endswith("_s") and name not in passing
        }
    return [lasting(value) for value in status] if isinstance(status, list) else status


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with ExitStack() as stack:
        yield Siege(tmp_path_factory.mktemp("siege"), stack)


def valid_messages(siege: Siege, peer: RawPeer, lease: LeaseItem, pull: Pull) -> list[Message]:
    """Every message that a generator may send, and those that it may not."""
    digest = siege.pull.digest
    return [
        Beat(state="at work", for_s=1.0, leases=[(lease.number, lease.attempt, 7)], numbers={"running": 1.0}),
        pull,
        Release(number=lease.number, attempt=lease.attempt, reason="failed", failed=True),
        result_of(peer, lease, 0),
        result_of(peer, lease, 1, has_observed=True, observed=np.array([False, True, False])),
        FetchManifest(version=0),
        FetchChunk(digest=digest, index=0),
        FetchFile(name="config.json", offset=0),
        StatusRequest(),
        Drain(reason="no reason"),
        Take(step=0, rank=0, num_ranks=1),
        Publish(version=1, digest=digest, manifest=b"{}", path="/nowhere", host="nowhere"),
        Advance(version=1),
        Evaluate(version=0),
    ]


def test_seven_thousand_damaged_frames_are_refused_one_by_one(siege: Siege) -> None:
    """Each was a message with every right to be heard: of its own session, about a lease that it holds."""
    rng = random.Random(1)
    vandal = siege.vandal
    messages = [*valid_messages(siege, vandal, siege.stolen, siege.pull), Bye(reason="leaves")]
    messages.append(vandal.introduction("another"))
    originals = [vandal.frames(message) for message in messages for _ in range(2)]
    with siege.attack("7,000 damaged messages") as refused:
        attack = [damaged(rng.choice(originals), rng.choice(originals), rng) for _ in range(7000)]
        answers = vandal.ask_all(attack)
        assert {type(answer.message) for answer in answers} == {Refused}
    assert refused.total() == 7000
    assert set(refused) == {"frames", "header", "version", "length", "checksum", "arrays"}


def test_three_thousand_lies_under_fitting_checksums_move_nothing(siege: Siege) -> None:
    """They are about a lease of somebody else, or of weights that nobody published: no change makes them true."""
    rng = random.Random(2)
    liar = siege.liar
    pull = siege.pull.model_copy(update={"digest": "0" * 64})
    messages = valid_messages(siege, liar, siege.leases[0], pull)
    messages.append(liar.introduction("another", reward_digest="another"))
    originals = [liar.frames(message) for message in messages]
    chunks = IN_FLIGHT * CHUNK_BYTES  # a question for a chunk that still makes sense is answered
    with siege.attack("3,000 undermined messages", more_memory=chunks) as refused:
        answers = liar.ask_all([undermined(rng.choice(originals), rng) for _ in range(3000)])
        assert {type(answer.message) for answer in answers}.isdisjoint({Leases, Welcome})
        assert {answer.status for answer in of_kind(answers, Verdict)} == {"late", "stale_epoch"}
    assert refused.total() == len(of_kind(answers, Refused)) > 1500
    assert set(refused) >= {"msgpack", "fields", "arrays", "role", "rewards", "file", "chunk"}


def of_kind(answers: list[Frames], kind: type[Any]) -> list[Any]:
    return [answer.message for answer in answers if isinstance(answer.message, kind)]


def nested(element: bytes, times: int, size: int) -> bytes:
    """A list of lists of so many elements each, `size` bytes in all."""
    inner = b"\xdc" + struct.pack(">H", times) + element * times
    count = size // len(inner)
    return b"\xdc" + struct.pack(">H", count) + inner * count


def test_messages_that_are_made_to_be_unpacked_slowly_keep_nobody_waiting(siege: Siege) -> None:
    """A byte of msgpack may become a list of 56 bytes, and a wrong list an error for each of its entries."""
    head = siege.liar.frames(Beat(state="at work"))[0]
    lists = b"\x81\xa6leases" + nested(b"\x90", 16000, MAX_QUESTION_BYTES - 100)
    maps = b"\x81\xa6leases" + nested(b"\x80", 16000, MAX_QUESTION_BYTES - 100)
    words = b"\x81\xa6leases" + nested(b"\xa2ab", 16000, MAX_QUESTION_BYTES - 100)
    wrong = msgpack.packb({"state": "at work", "leases": [["a", "b", "c"]] * 4096, "_": []})
    larger = b"\x81\xa6leases" + nested(b"\x90", 16000, 8 * MAX_QUESTION_BYTES)
    with siege.attack("500 messages that are slow to unpack", HEAVY_PING_S) as refused:
        siege.liar.ask_all([repaired([head, body]) for body in (lists, maps, words, wrong, larger)] * 100, in_flight=2)
    assert refused == {"msgpack": 200, "arrays": 100, "fields": 100, "length": 100}


def test_a_ping_does_not_wait_until_the_weights_are_sent(siege: Siege) -> None:
    """Encrypting a chunk takes the broker 10 ms, but not the thread that pings go through."""
    chunk = siege.liar.frames(FetchChunk(digest=siege.pull.digest, index=0))
    with ExitStack() as stack:
        readers = [stack.enter_context(RawPeer(siege.folder, Role.GENERATOR)) for _ in range(4)]
        siege.liar.sockets, own = [reader.sockets[1] for reader in readers], siege.liar.sockets
        siege.liar.ask_all([chunk] * 4)
        with siege.attack("100 chunks of 4 MiB, 16 in flight", HEAVY_PING_S, more_memory=IN_FLIGHT * CHUNK_BYTES):
            answers = siege.liar.ask_all([chunk] * 100)
        siege.liar.sockets = own
    assert {len(answer.data) for answer in of_kind(answers, Bytes)} == {CHUNK_BYTES}


def test_a_thousand_garbage_connections_reach_nobody(siege: Siege) -> None:
    """Bytes, half handshakes, other mechanisms and versions, no key, wrong keys; held, closed and reset."""
    rng = random.Random(3)
    ports = [int(address.rpartition(":")[2]) for address in Addresses.read(siege.folder)]
    with siege.attack("1,000 garbage connections") as refused, ExitStack() as stack:
        strangers = stack.enter_context(unwelcome_sockets(siege.folder, 100))
        half_open = [stack.enter_context(connection(ports[number % 2])) for number in range(200)]
        for number, held_open in enumerate(half_open):
            held_open.sendall(GARBAGE[number % len(GARBAGE)](rng))
        stack.enter_context(RawPeer(siege.folder, Role.STATUS, "newcomer")).hello()
        for number in range(700):
            one = connection(ports[number % 2])
            one.sendall(GARBAGE[number % len(GARBAGE)](rng))
            if number % 3 == 0:  # a reset, where a close says goodbye
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        for held_open in half_open:
            wait_until_closed(held_open)
        assert not any(stranger.poll(0) for stranger in strangers)
    assert set(refused) == {"stranger"}
    assert refused["stranger"] >= 25


def greeting(mechanism: bytes, minor: int = 0) -> bytes:
    """Of ZMTP 3: signature, version, mechanism, as-server, filler."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes([3, minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, data: bytes) -> bytes:
    body = bytes([len(name)]) + name + data
    return b"\x06" + struct.pack(">Q", len(body)) + body


GARBAGE: tuple[Callable[[random.Random], bytes], ...] = (
    lambda rng: b"",
    lambda rng: rng.randbytes(rng.randrange(1, 300)),
    lambda rng: b"GET / HTTP/1.1\r\n\r\n",
    lambda rng: greeting(b"CURVE")[: rng.randrange(1, 64)],
    lambda rng: b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\x00\x00",  # ZMTP 2: a DEALER without a name
    lambda rng: b"\x01\x00",  # ZMTP 1
    lambda rng: greeting(b"NULL") + command(b"READY", b"\x0bSocket-Type\0\0\0\x06DEALER"),
    lambda rng: greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x05admin"),
    lambda rng: greeting(b"CURVE") + command(b"HELLO", rng.randbytes(194)),
    lambda rng: greeting(b"CURVE", minor=1) + command(b"INITIATE", rng.randbytes(300)),
    lambda rng: greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 1 << 62) + rng.randbytes(1000),
)


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def wait_until_closed(held_open: socket.socket) -> None:
    """Until the broker has hung up, after all that it says first. HANDSHAKE_IVL: at most 5 s."""
    try:
        while held_open.recv(1024):
            pass
    except ConnectionResetError:
        pass


@contextmanager
def unwelcome_sockets(folder: Path, number: int) -> Iterator[list[Any]]:
    """Sockets of ZeroMQ that try again and again: no key, a password, an unlisted key, the key of another server."""
    key, server = read_client_key(folder / "keys" / "generator.key"), read_server_key(folder)
    context: zmq.Context[Any] = zmq.Context()
    made = []
    for index in range(number):
        public, secret = (part.decode() for part in zmq.curve_keypair())
        address = Addresses.read(folder)[index % 2]
        match index % 4:
            case 0:
                one = context.socket(zmq.DEALER)
                one.connect(address)
            case 1:
                one = context.socket(zmq.DEALER)
                one.plain_username, one.plain_password = b"admin", b"admin"
                one.connect(address)
            case 2:
                one = connect_dealer(context, address, ClientKey(Role.GENERATOR, public, secret, server.public))
            case _:
                one = connect_dealer(context, address, ClientKey(Role.GENERATOR, key.public, key.secret, public))
        one.send(b"let me in", zmq.NOBLOCK)
        made.append(one)
    yield made
    context.destroy(linger=0)


def test_the_run_goes_on_as_if_nothing_had_happened(siege: Siege) -> None:
    assert siege.finish() == sorted(lease.number for lease in siege.leases)


def test_a_broker_that_has_no_descriptor_left_serves_those_it_has_and_then_everybody(tmp_path: Path) -> None:
    """More half-open connections than it may hold: those who are in notice nothing, a newcomer waits 5 s at most."""
    run_on_disk(tmp_path)
    address = Addresses.read(tmp_path).control
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerProcess(tmp_path, max_descriptors=128))
        broker.serves()
        pinger = stack.enter_context(Pinger(tmp_path))
        began = time.monotonic()
        flood = [stack.enter_context(connection(int(address.rpartition(":")[2]))) for _ in range(200)]
        wait_until(lambda: broker.num_descriptors == 128, "the last descriptor's use")
        assert stack.enter_context(RawPeer(tmp_path, Role.STATUS, "newcomer")).hello().run_id == "test"
        latencies = pinger.between(began, time.monotonic())
        print(f"\nout of descriptors: {latencies}")
        assert latencies.p99 < HEAVY_PING_S, latencies
        assert latencies.worst < 5.0, latencies
        assert "Traceback" not in broker.log
        assert len(flood) == 200
