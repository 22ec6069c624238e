"""A real broker server on real sockets in a thread, around any object with the service's interface."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from broker.server import Server
from protocol.addresses import Addresses
from protocol.keys import allowed_keys, make_run_keys, read_server_key
from protocol.sockets import AllowList, bind_router, broker_context, start_authenticator


class SmallService:
    """What the server needs of a service; `answer` is a test's own function of (message, header, role)."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.epoch = 1
        self.changed = False
        self.refused: Counter[str] = Counter()

    def handle(self, message: Any, header: Any, key: str, role: Any, route: bytes, now: float) -> Any:
        return self.answer(message, header, role)

    def undelivered(self, answer: Any) -> None:
        pass

    def tick(self, now: float) -> None:
        pass

    def farewells(self) -> list[Any]:
        return []

    def take_hints(self) -> list[Any]:
        return []


def wait_until(condition: Callable[[], Any], what: str, within_s: float = 20.0) -> Any:
    """What the condition gave when it first held."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s} s"
        time.sleep(0.005)
    return found


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_addresses() -> Addresses:
    """Two ports in a row, as `--connect` expects them."""
    while True:
        port = free_port()
        with closing(socket.socket()) as following, suppress(OSError, OverflowError):
            following.bind(("127.0.0.1", port + 1))
            return Addresses(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}")


@contextmanager
def serving(run_dir: Path, service: Any, addresses: Addresses | None = None) -> Iterator[tuple[Addresses, Server]]:
    """The server in a thread, with the run's keys; stopped and joined at the end."""
    make_run_keys(run_dir)
    addresses = addresses or free_addresses()
    context = broker_context()
    allow = AllowList(allowed_keys(run_dir))
    authenticator = start_authenticator(context, allow)
    key = read_server_key(run_dir)
    control = bind_router(context, addresses.control, key, io_thread=0)
    bulk = bind_router(context, addresses.bulk, key, io_thread=1)
    server = Server(control, bulk, allow, service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield addresses, server
    finally:
        server.stop()
        thread.join(10)
        authenticator.stop()
        context.destroy(linger=200)  # as the broker's main does: its last words are sent
        assert not thread.is_alive()
