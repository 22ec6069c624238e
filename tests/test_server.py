"""The broker's poll loop under peers that are slow, gone, repetitive or hostile; on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.outcome import Later
from broker.server import Server
from protocol.addresses import Addresses
from protocol.channel import RENEW_S
from protocol.codec import Frames, Header, decode, encode
from protocol.errors import PeerTimeout, ProtocolError
from protocol.keys import read_client_key
from protocol.messages import Done, Hello, Message, Pull, Refused, Role, StatusRequest, Take, Wait, Welcome
from protocol.session import Session
from protocol.sockets import AllowList, connect_dealer
from tests.engines import until
from tests.lines import Line, arrived
from tests.tcp_proxy import TcpProxy
from tests.wire import SmallService, serving

GRANTED = Wait(reason="granted")  # stands for an answer that hands something out


class Parking(SmallService):
    """Parks every Pull and Take until `ready`; then it answers GRANTED, or does what `fails` says."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.ready = False
        self.fails: Exception | None = None
        self.num_asked = 0
        self.lost: list[Message] = []

    def _answer(self, message: Message, header: Any, role: Any) -> Any:
        if isinstance(message, Hello):
            return Welcome(session=1, run_id="r", settings={}, heartbeat_s=1.0)
        if not isinstance(message, Pull | Take):
            return Done()
        self.num_asked += 1
        if not self.ready:
            return Later(Wait(reason="not yet"))
        if self.fails is not None:
            raise self.fails
        return GRANTED

    def undelivered(self, answer: Message) -> None:
        self.lost.append(answer)

    def open(self) -> None:
        self.ready = self.changed = True


class Peer:
    """A bare socket: it sends what it likes and counts what comes."""

    def __init__(self, folder: Path, addresses: Addresses, role: Role = Role.GENERATOR) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        key = read_client_key(folder / "keys" / f"{role}.key")
        self.socket = connect_dealer(self._context, addresses.control, key)

    def send(self, message: Message, session: int = 1, sequence: int = 1) -> None:
        self.socket.send_multipart(encode(message, Header(1, session, sequence)))

    def receive(self, within_s: float = 10.0) -> Frames:
        assert self.socket.poll(int(within_s * 1000)), f"no answer within {within_s} s"
        return decode(self.socket.recv_multipart())

    def all_before(self, sequence: int) -> list[Frames]:
        """Everything that arrives before the answer to this question, which is asked last."""
        self.send(StatusRequest(), sequence=sequence)
        found: list[Frames] = []
        while (frames := self.receive()).header.sequence != sequence:
            found.append(frames)
        return found

    def close(self) -> None:
        self.socket.close(linger=0)
        self._context.term()


@contextlib.contextmanager
def together(folder: Path, service: SmallService, role: Role = Role.GENERATOR) -> Iterator[tuple[Peer, Server]]:
    with serving(folder, service) as (addresses, server):
        peer = Peer(folder, addresses, role)
        try:
            yield peer, server
        finally:
            peer.close()


PULL = Pull(version=0, digest="", room=1)


def test_a_question_that_is_repeated_while_it_is_parked_is_answered_once(tmp_path: Path) -> None:
    service = Parking()
    with together(tmp_path, service) as (peer, server):
        for _ in range(50):
            peer.send(PULL, sequence=7)
        assert peer.all_before(100) == []
        assert len(server._parked) == 1
        service.open()
        assert peer.receive().header.sequence == 7
        assert peer.all_before(101) == []
        assert server._parked == {}


def test_of_a_peers_parked_questions_the_last_is_kept(tmp_path: Path) -> None:
    """The earlier one was given up by its asker: an answer to it would hand out leases that nobody takes."""
    service = Parking()
    with together(tmp_path, service) as (peer, server):
        for sequence in range(1, 51):
            peer.send(PULL, sequence=sequence)
        assert peer.all_before(100) == []
        assert len(server._parked) == 1
        service.open()
        assert [peer.receive().header.sequence, *(f.header.sequence for f in peer.all_before(101))] == [50]


def test_parked_questions_of_sessions_that_end_are_refused_and_forgotten(tmp_path: Path) -> None:
    service = Parking()
    with together(tmp_path, service) as (peer, server):
        for session in range(1, 201):
            peer.send(PULL, session=session, sequence=session)
        peer.all_before(1000)
        assert len(server._parked) == 200
        service.fails = ProtocolError("session", "say hello again")
        service.open()
        answers = [peer.receive() for _ in range(200)]
        assert {frames.header.sequence for frames in answers} == set(range(1, 201))
        assert all(isinstance(frames.message, Refused) for frames in answers)
        assert server._parked == {}
        assert server.refused == {"session": 200}


def test_a_bug_that_a_parked_question_meets_is_its_askers_error_and_the_broker_lives(tmp_path: Path) -> None:
    service = Parking()
    with together(tmp_path, service, Role.LEARNER) as (peer, _):
        peer.send(Take(step=0, rank=0, num_ranks=1), sequence=3)
        assert peer.all_before(100) == []
        service.fails = KeyError("bug")
        service.open()
        answer = peer.receive()
        assert answer.header.sequence == 3
        assert answer.message == Refused(code="internal", text="KeyError in the broker; see its log")
        assert peer.all_before(101) == []


def test_an_answer_that_cannot_be_written_is_an_error_of_one_peer(tmp_path: Path) -> None:
    service = SmallService(lambda message, header, role: Welcome.model_construct(session=object()))
    with together(tmp_path, service) as (peer, _):
        peer.send(PULL)
        answer = peer.receive().message
        assert isinstance(answer, Refused)
        assert answer.code == "internal"


def test_what_a_peer_that_is_gone_would_have_got_is_given_back(tmp_path: Path) -> None:
    service = Parking()
    with serving(tmp_path, service) as (addresses, server):
        gone, here = Peer(tmp_path, addresses), Peer(tmp_path, addresses)
        gone.send(PULL, session=1)
        assert gone.all_before(100) == []
        gone.close()
        late = Peer(tmp_path, addresses)  # a whole handshake later the broker has seen the other one go
        assert late.all_before(1) == []
        here.send(PULL, session=2)
        assert here.all_before(100) == []
        service.open()
        assert here.receive().message == GRANTED
        assert here.all_before(101) == []
        assert service.lost == [GRANTED]
        assert server.refused == {"unreachable": 1}
        here.close()
        late.close()


def test_what_an_answer_sets_free_is_given_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering one parked question may answer another that was looked at before it: no tick goes by in between."""
    monkeypatch.setattr("broker.server.TICK_S", 1.5)
    service = Parking()
    order: list[str] = []

    def answer(message: Message, header: Any, role: Any) -> Any:
        if isinstance(message, Take) and service.ready:
            service.changed = True
            order.append("take")
            return Wait(reason="cut")
        if isinstance(message, Pull) and order:
            return GRANTED
        return Later(Wait(reason="not yet")) if isinstance(message, Pull | Take) else Done()

    service.answer = answer
    with serving(tmp_path, service) as (addresses, _):
        generator, learner = Peer(tmp_path, addresses), Peer(tmp_path, addresses, Role.LEARNER)
        generator.send(PULL, session=1)
        assert generator.all_before(100) == []
        learner.send(Take(step=0, rank=0, num_ranks=1), session=2)
        assert learner.all_before(100) == []
        service.open()
        learner.send(StatusRequest())  # wakes the loop
        assert {str(learner.receive().message) for _ in range(2)} == {str(Done()), str(Wait(reason="cut"))}
        assert generator.receive(within_s=0.75).message == GRANTED
        generator.close()
        learner.close()


def test_no_answer_of_a_broker_that_was_replaced_reaches_who_asked(tmp_path: Path) -> None:
    """While the answer is under way another question meets the new broker: what the old one gave is void."""

    async def talk(addresses: Addresses) -> None:
        key = read_client_key(tmp_path / "keys" / "generator.key")
        hello = Hello(role="generator", name="g", incarnation=1)
        session = await Session.open(addresses, key, lambda: hello, timeout_s=10.0)
        request, answers = session._control.request, []

        async def delayed(message: Message, **how: Any) -> Frames:
            frames = await request(message, **how)
            answers.append(frames)
            if len(answers) == 1:
                service.epoch = 2
                await session.greet(10.0)
            return frames

        session._control.request = delayed  # type: ignore[method-assign]
        await session.ask(PULL, timeout_s=10.0)
        assert [frames.header.epoch for frames in answers if frames.message == GRANTED] == [1, 2]
        await session.close()

    service = Parking()
    service.ready = True
    with serving(tmp_path, service) as (addresses, _):
        asyncio.run(talk(addresses))


def test_after_an_idle_time_a_question_waits_as_long_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.05)

    async def talk(addresses: Addresses) -> None:
        key = read_client_key(tmp_path / "keys" / "generator.key")
        hello = Hello(role="generator", name="g", incarnation=1)
        session = await Session.open(addresses, key, lambda: hello, timeout_s=10.0)
        session._bulk._heard_at -= 100.0  # so long ago the last answer came
        socket = session._bulk._socket
        with pytest.raises(PeerTimeout):
            await session.ask(PULL, bulk=True, timeout_s=0.3)
        assert session._bulk._socket is socket
        await session.close()

    service = Parking()
    with serving(tmp_path, service) as (addresses, _):
        asyncio.run(talk(addresses))
    assert service.num_asked == 1


def test_a_question_whose_connection_broke_is_repeated_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the only one, so no later answer can tell that it was lost; long before the silence does, it is known."""
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.05)
    service = Parking()

    async def talk(addresses: Addresses, line: TcpProxy) -> None:
        key = read_client_key(tmp_path / "keys" / "generator.key")
        hello = Hello(role="generator", name="g", incarnation=1)
        through = Addresses(addresses.control, line.address)
        session = await Session.open(through, key, lambda: hello, timeout_s=10.0)
        asking = asyncio.create_task(session.ask(PULL, bulk=True, timeout_s=60.0))
        await until(lambda: service.num_asked == 1, "it is asked")
        line.cut()
        await until(lambda: service.num_asked == 2, "it is asked again", timeout_s=RENEW_S / 2)
        service.open()
        assert await asking == GRANTED
        await session.close()

    with serving(tmp_path, service) as (addresses, _), TcpProxy(addresses.bulk) as line:
        asyncio.run(talk(addresses, line))


def test_many_silent_requests_renew_their_socket_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each renewal drops what the others have just sent: taking turns, they would never be heard."""
    monkeypatch.setattr("protocol.channel.REPEAT_S", 0.2)
    monkeypatch.setattr("protocol.channel.RENEW_S", 0.6)
    renewed = []

    async def talk(addresses: Addresses) -> None:
        key = read_client_key(tmp_path / "keys" / "generator.key")
        hello = Hello(role="generator", name="g", incarnation=1)
        session = await Session.open(addresses, key, lambda: hello, timeout_s=10.0)
        reconnect = session._bulk._reconnect

        def counted() -> None:
            renewed.append(asyncio.get_running_loop().time())
            reconnect()

        session._bulk._reconnect = counted  # type: ignore[method-assign]
        asks = [session.ask(StatusRequest(), bulk=True, timeout_s=20.0) for _ in range(40)]
        waiting = asyncio.gather(*asks)
        await until(lambda: len(renewed) == 2, "two renewals")
        silent.clear()
        assert len(await waiting) == 40
        await session.close()

    silent = [True]
    with serving(tmp_path, Parking()) as (addresses, server):
        transmit = server._transmit

        def deaf(socket: Any, route: bytes, message: Message, header: Header) -> bool:
            return True if silent and socket is server._bulk else transmit(socket, route, message, header)

        server._transmit = deaf  # type: ignore[method-assign]
        asyncio.run(talk(addresses))
    assert renewed[1] - renewed[0] >= 0.55
    assert len(renewed) <= 4


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_those_who_wait_get_at_most_half_of_the_servers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to ask again for all of them, others have as long a turn in between."""
    clock = Clock()
    monkeypatch.setattr("broker.server.time", clock)
    service = Parking()

    def answer(message: Message, header: Any, role: Any) -> Any:
        clock.now += 0.01 if isinstance(message, Pull) else 0.001
        return Later(Wait(reason="not yet")) if isinstance(message, Pull) else Done()

    service.answer = answer
    control, bulk = Line(), Line()
    server = Server(control, bulk, AllowList({"key": Role.GENERATOR}), service)  # type: ignore[arg-type]
    control.waiting.extend(arrived(b"g", encode(PULL, Header(1, session, 1)), "key") for session in range(1, 31))
    while control.waiting:
        server.turn([control])  # type: ignore[list-item]
    for line in (control, bulk):
        line.waiting.extend(arrived(b"g", encode(StatusRequest(), Header(1, 1, n)), "key") for n in range(1, 1001))
    for _ in range(2):
        before, num_left = clock.now, len(bulk.waiting)
        service.changed = True
        server.turn([control, bulk])  # type: ignore[list-item]
    assert clock.now - before == pytest.approx(3 * 0.3, abs=0.02)
    assert num_left - len(bulk.waiting) == pytest.approx(300, abs=2)
