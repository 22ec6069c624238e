"""Who gets in and who does not: keys on the socket, and the proof at every start that the socket asks for them."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from launch.broker import serve
from launch.preflight import check
from protocol.errors import Exit, PreflightError
from protocol.keys import ClientKey, make_run_keys, read_client_key, read_server_key
from protocol.messages import Done, Refused, Role, StatusRequest
from protocol.sockets import AllowList, bind_router, broker_context, connect_dealer, self_test, start_authenticator
from tests.broker_process import run_on_disk
from tests.raw_peer import RawPeer
from tests.wire import SmallService, free_addresses, serving, wait_until

ENDS = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "hung up",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "hung up",  # of another mechanism: which of the two is seen is a race
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "not listed",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "admitted",
}


def keys(folder: Path) -> dict[str, ClientKey | None]:
    """Of four clients that may not get in, and of one that may."""
    made = {role: read_client_key(folder / "keys" / f"{role}.key") for role in Role}
    public, secret = (part.decode() for part in zmq.curve_keypair())
    good, revoked = made[Role.GENERATOR], made[Role.STATUS]
    (folder / "keys" / "status.key").unlink()
    return {
        "no key": None,
        "an unknown key": ClientKey(Role.GENERATOR, public, secret, good.server),
        "a revoked key": revoked,
        "a good key for another server": ClientKey(Role.GENERATOR, good.public, good.secret, public),
        "a good key": good,
    }


def end_of_handshake(address: str, key: ClientKey | None) -> str:
    """How the first handshake with the server ends, as a client sees it that would say hello at once."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        one = context.socket(zmq.DEALER) if key is None else connect_dealer(context, address, key)
        monitor = one.get_monitor_socket(sum(ENDS))
        if key is None:
            one.connect(address)
        one.send(b"hello")
        assert monitor.poll(10_000), "no end of the handshake within 10 s"
        return ENDS[recv_monitor_message(monitor)["event"]]
    finally:
        context.destroy(linger=0)


def test_only_a_listed_key_for_this_server_gets_in_and_strangers_are_counted(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    clients = keys(tmp_path)
    good = clients.pop("a good key")
    with serving(tmp_path, SmallService(lambda *_: Done())) as (addresses, server):
        seen = {who: end_of_handshake(address, key) for who, key in clients.items() for address in addresses}
        assert seen == {
            "no key": "hung up",
            "an unknown key": "not listed",
            "a revoked key": "not listed",
            "a good key for another server": "hung up",
        }
        wait_until(lambda: server.refused["stranger"] == 4, "the count of strangers")
        assert end_of_handshake(addresses.control, good) == "admitted"
        assert set(server.refused) <= {"stranger", "frames", "unreachable"}, "what the good one said, and nothing else"
        assert server.refused["frames"] <= 1


def test_a_key_that_is_revoked_while_its_holder_is_connected_is_refused_by_name(tmp_path: Path) -> None:
    with ExitStack() as stack:
        addresses, server = stack.enter_context(serving(tmp_path, SmallService(lambda *_: Done())))
        peer = stack.enter_context(RawPeer(tmp_path, Role.STATUS, addresses=addresses))
        assert peer.ask(StatusRequest()) == Done()
        server._allow.roles = {}
        assert peer.ask(StatusRequest()) == Refused(code="key", text="this key is not listed any more")
        assert server.refused["key"] == 1


def test_the_self_test_takes_no_second_of_a_start(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    key, address, context = read_server_key(tmp_path), free_addresses().control, broker_context()
    authenticator = start_authenticator(context, AllowList({}))
    router = bind_router(context, address, key)
    began = time.monotonic()
    self_test(context, address, key)
    assert time.monotonic() - began < 1.0
    router.close()
    authenticator.stop()
    context.destroy(linger=0)


def test_a_socket_that_asks_for_no_key_does_not_pass_the_self_test(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    context: zmq.Context[Any] = zmq.Context()
    address = free_addresses().control
    router = context.socket(zmq.ROUTER)
    router.bind(address)
    with pytest.raises(PreflightError, match="to refuse a peer without a key, it was admitted; the run does not start"):
        self_test(context, address, read_server_key(tmp_path))
    router.close()
    context.destroy(linger=0)


def test_a_port_that_says_nothing_does_not_pass_the_self_test(tmp_path: Path) -> None:
    make_run_keys(tmp_path)
    context: zmq.Context[Any] = zmq.Context()
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(PreflightError, match="is the port really ours"):
        self_test(context, f"tcp://127.0.0.1:{mute.getsockname()[1]}", read_server_key(tmp_path), timeout_s=0.2)
    context.destroy(linger=0)


def test_without_encryption_in_the_library_nothing_starts_and_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq can be built without CURVE; then every start ends so: the command's, the broker's, a lone generator's."""
    config = run_on_disk(tmp_path)
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    starts: list[Any] = [
        lambda: check(config),
        lambda: serve(tmp_path),
        lambda: read_client_key(tmp_path / "keys" / "generator.key"),
    ]
    for start in starts:
        with pytest.raises(PreflightError, match="without; install pyzmq as a wheel: pip install") as caught:
            start()
        assert caught.value.exit_code == Exit.PREFLIGHT
