"""The line that fault tests break: that each fault is what it says, and what it counts is what came."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.tcp_proxy import TcpProxy

DEADLINE_S = 10.0


def echo(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    try:
        while data := connection.recv(1 << 16):
            connection.sendall(data)
    except OSError:
        pass
    finally:
        connection.close()


@pytest.fixture
def line() -> Iterator[TcpProxy]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        threading.Thread(target=echo, args=(listening,), daemon=True).start()
        with TcpProxy(f"tcp://127.0.0.1:{listening.getsockname()[1]}") as proxy:
            yield proxy
        listening.shutdown(socket.SHUT_RDWR)


def connect(line: TcpProxy) -> socket.socket:
    host, _, port = line.address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer when the connection ends."""
    data = b""
    try:
        while len(data) < num_bytes and (more := connection.recv(num_bytes - len(data))):
            data += more
    except ConnectionError:
        pass
    return data


def test_what_is_sent_comes_and_is_counted(line: TcpProxy) -> None:
    with connect(line) as one, connect(line) as other:
        for connection in (one, other):
            connection.sendall(b"hello")
            assert receive(connection, 5) == b"hello"
    assert (line.num_connections, line.up.num_bytes, line.down.num_bytes) == (2, 10, 10)


def test_a_cut_comes_at_its_byte_and_a_flipped_bit_too(line: TcpProxy) -> None:
    line.down.flip_at.append(3)
    line.down.cut_at += [8, 9]
    with connect(line) as first, connect(line) as second:
        first.sendall(bytes(20))
        assert receive(first, 20) == b"\0\0\0\1\0\0\0\0"
        assert receive(second, 1) == b"", "all connections are cut"
    with connect(line) as third:
        third.sendall(b"ab")
        assert receive(third, 2) == b"a"
    assert line.down.num_bytes == 9


def test_what_is_held_comes_later_and_what_is_stranded_never(line: TcpProxy) -> None:
    with connect(line) as old:
        line.hold()
        with connect(line) as new:
            for connection in (old, new):
                connection.sendall(b"x")
                connection.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            line.release()
            for connection in (old, new):
                connection.settimeout(DEADLINE_S)
                assert receive(connection, 1) == b"x"
            line.strand()
            new.sendall(b"y")
            new.settimeout(0.1)
            with pytest.raises(TimeoutError):
                new.recv(1)
        with connect(line) as newer:
            newer.sendall(b"z")
            assert receive(newer, 1) == b"z"


def test_a_line_that_accepts_nobody_ends_who_connects_and_no_other(line: TcpProxy) -> None:
    with connect(line) as before:
        before.sendall(b"a")
        assert receive(before, 1) == b"a"
        line.accepts = False
        with connect(line) as refused:
            assert receive(refused, 1) == b""
        before.sendall(b"b")
        assert receive(before, 1) == b"b"


def test_delay_and_rate_take_their_time(line: TcpProxy) -> None:
    with connect(line) as connection:
        line.up.delay_s = 0.1
        line.down.bytes_per_s = 500_000
        started = time.monotonic()
        connection.sendall(bytes(100_000))
        assert len(receive(connection, 100_000)) == 100_000
        assert time.monotonic() - started > 0.1 + 0.2 - 0.01
