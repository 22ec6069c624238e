"""Requests and answers over real CURVE sockets:

who gets in, what is refused, and what a restart looks like to a peer.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker.outcome import Later
from protocol.addresses import Addresses
from protocol.channel import RENEW_S
from protocol.errors import ConfigError, PeerTimeout, PreflightError, ProtocolError, RunLocked
from protocol.keys import ClientKey, make_run_keys, read_client_key, read_server_key
from protocol.messages import (
    Bye,
    Done,
    Hello,
    Message,
    Pull,
    Role,
    StatusAnswer,
    StatusRequest,
    Take,
    Wait,
    Welcome,
)
from protocol.session import Session
from protocol.sockets import AllowList, bind_router, connect_dealer, self_test, start_authenticator
from tests.engines import until
from tests.wire import SmallService, free_addresses, serving


def polite(message: Message, header: Any, role: Role) -> Any:
    match message:
        case Hello():
            return Welcome(session=5, run_id="r", settings={}, heartbeat_s=1.0)
        case StatusRequest():
            return StatusAnswer(status={"ok": True})
        case Bye():
            return Done()
    raise ProtocolError("type", "not expected here")


def key_of(run_dir: Path, role: Role) -> ClientKey:
    return read_client_key(run_dir / "keys" / f"{role}.key")


def hello(role: Role) -> Hello:
    return Hello(role=role.value, name="test", incarnation=1)


async def opened(run_dir: Path, addresses: Addresses, role: Role = Role.STATUS, timeout_s: float = 10.0) -> Session:
    return await Session.open(addresses, key_of(run_dir, role), lambda: hello(role), timeout_s=timeout_s)


def test_a_listed_key_gets_an_answer(tmp_path: Path) -> None:
    async def talk(addresses: Addresses) -> None:
        session = await opened(tmp_path, addresses)
        answer = await session.ask(StatusRequest(), timeout_s=5)
        assert isinstance(answer, StatusAnswer)
        assert answer.status == {"ok": True}
        await session.close()

    with serving(tmp_path, SmallService(polite)) as (addresses, _):
        asyncio.run(talk(addresses))


def test_an_unlisted_key_gets_no_answer_and_a_named_deadline(tmp_path: Path) -> None:
    async def talk(addresses: Addresses) -> None:
        public, secret = (part.decode() for part in zmq.curve_keypair())
        stranger = ClientKey(Role.STATUS, public, secret, read_server_key(tmp_path).public)
        with pytest.raises(PeerTimeout, match="waited 1 s for the broker's welcome"):
            await Session.open(addresses, stranger, lambda: hello(Role.STATUS), timeout_s=1.0)

    with serving(tmp_path, SmallService(polite)) as (addresses, _):
        asyncio.run(talk(addresses))


def test_a_key_may_only_send_what_its_role_may(tmp_path: Path) -> None:
    async def talk(addresses: Addresses) -> None:
        session = await opened(tmp_path, addresses, Role.GENERATOR)
        with pytest.raises(ProtocolError, match="a generator may not send Take"):
            await session.ask(Take(step=0, rank=0, num_ranks=1), timeout_s=5)
        with pytest.raises(ProtocolError, match="a generator may not send Welcome"):
            await session.ask(Welcome(session=1, run_id="", settings={}, heartbeat_s=1.0), timeout_s=5)
        await session.close()

    with serving(tmp_path, SmallService(polite)) as (addresses, server):
        asyncio.run(talk(addresses))
        assert server.refused["role"] == 2


def test_a_question_without_an_answer_is_parked_until_something_changes(tmp_path: Path) -> None:
    box: dict[str, Any] = {}

    def answer(message: Message, header: Any, role: Role) -> Any:
        if isinstance(message, Pull):
            box["asked"] = box.get("asked", 0) + 1
            return Done() if box.get("open") else Later(Wait(reason="nothing yet"))
        return polite(message, header, role)

    service = SmallService(answer)

    async def talk(addresses: Addresses) -> float:
        session = await opened(tmp_path, addresses, Role.GENERATOR)
        question = asyncio.create_task(session.ask(Pull(version=0, digest="", room=1), timeout_s=10))
        await until(lambda: bool(box.get("asked")), "the question reaches the service")
        box["open"], service.changed, started = True, True, time.monotonic()
        assert isinstance(await question, Done)
        await session.close()
        return time.monotonic() - started

    with serving(tmp_path, service) as (addresses, _):
        assert asyncio.run(talk(addresses)) < 1.0


def test_a_restarted_broker_is_greeted_anew_and_the_question_answered(tmp_path: Path) -> None:
    """The first broker dies with the session; the second knows nobody, and answers under a new epoch."""
    addresses = free_addresses()

    def forgetful(message: Message, header: Any, role: Role) -> Any:
        if isinstance(message, Hello):
            return Welcome(session=77, run_id="r", settings={}, heartbeat_s=1.0)
        if header.session != 77:
            raise ProtocolError("session", "say hello again")
        return polite(message, header, role)

    async def talk() -> None:
        epochs: list[int] = []
        with serving(tmp_path, SmallService(polite), addresses):
            session = await opened(tmp_path, addresses)
            session.on_epoch = epochs.append
        second = SmallService(forgetful)
        second.epoch = 2
        with serving(tmp_path, second, addresses):
            answer = await session.ask(StatusRequest(), timeout_s=20)
            assert isinstance(answer, StatusAnswer)
            assert epochs == [2]
            await session.close()

    asyncio.run(talk())


def test_a_bug_in_the_service_is_one_askers_error(tmp_path: Path) -> None:
    def broken(message: Message, header: Any, role: Role) -> Any:
        if isinstance(message, StatusRequest):
            raise KeyError("bug")
        return polite(message, header, role)

    async def talk(addresses: Addresses) -> None:
        session = await opened(tmp_path, addresses)
        with pytest.raises(ProtocolError, match="KeyError in the broker"):
            await session.ask(StatusRequest(), timeout_s=5)
        await session.close()

    with serving(tmp_path, SmallService(broken)) as (addresses, _):
        asyncio.run(talk(addresses))


def test_garbage_connections_reach_nobody_and_an_honest_peer_notices_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    greetings = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f\x03"]

    def attack(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(rng.choice(greetings) + rng.randbytes(rng.randrange(200)))

    async def talk(addresses: Addresses) -> float:
        session = await opened(tmp_path, addresses)
        port, worst = int(addresses.control.rpartition(":")[2]), 0.0
        for _ in range(20):
            for _ in range(10):
                attack(port)
            started = time.monotonic()
            await session.ask(StatusRequest(), timeout_s=5)
            worst = max(worst, time.monotonic() - started)
        await session.close()
        return worst

    with serving(tmp_path, SmallService(polite)) as (addresses, server):
        assert asyncio.run(talk(addresses)) < 0.5
        assert not server.refused


def test_a_taken_port_is_named_with_what_to_do(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    with serving(tmp_path, SmallService(polite)) as (addresses, _):
        context: zmq.Context[Any] = zmq.Context()
        with pytest.raises(
            RunLocked, match=r"the broker needs tcp://127.0.0.1:\d+, but address already in use; end the process"
        ):
            bind_router(context, addresses.control, read_server_key(tmp_path))
        context.destroy(linger=0)


def test_one_large_message_on_a_slow_line_is_no_dead_connection(tmp_path: Path) -> None:
    """While it arrives no heartbeat does, so the io threads must be more patient than a channel."""
    make_run_keys(tmp_path)
    context: zmq.Context[Any] = zmq.Context()
    address = free_addresses().control
    ends = [
        bind_router(context, address, read_server_key(tmp_path)),
        connect_dealer(context, address, key_of(tmp_path, Role.GENERATOR)),
    ]
    for end in ends:
        for option in (zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL):
            assert end.getsockopt(option) > 1000 * RENEW_S
    context.destroy(linger=0)


def test_the_self_test_passes_on_a_guarded_socket_and_fails_on_an_open_one(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    key = read_server_key(tmp_path)

    class Everybody(AllowList):
        def callback(self, domain: str, key: bytes) -> bool:
            return True

    for allow, admitted in ((AllowList({}), False), (Everybody({}), True)):
        context: zmq.Context[Any] = zmq.Context()
        authenticator = start_authenticator(context, allow)
        address = free_addresses().control
        router = bind_router(context, address, key)
        if admitted:
            with pytest.raises(PreflightError, match="to refuse a key that is not listed, it was admitted"):
                self_test(context, address, key)
        else:
            self_test(context, address, key)
        router.close()
        authenticator.stop()
        context.destroy(linger=0)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    path = tmp_path / "keys" / "generator.key"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="run chmod 600"):
        read_client_key(path)
    path.chmod(0o600)
    assert read_client_key(path).role is Role.GENERATOR
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0


def test_a_connect_url_without_a_port_is_refused_with_the_form_expected() -> None:
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        Addresses.from_url("tcp://localhost")
    assert Addresses.from_url("tcp://h:5555").bulk == "tcp://h:5556"
