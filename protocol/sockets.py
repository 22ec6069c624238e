"""Every ZeroMQ option that Tether sets, and why. All sockets of all processes are made here.

Two kinds: the broker binds ROUTER sockets, everybody else connects DEALER sockets. Each is CURVE-encrypted, loopback
too, and the broker's authenticator (ZAP) admits only listed public keys. `self_test` proves at every start that who
has no key is refused, and who has an unlisted one.
"""

from __future__ import annotations

import os
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from protocol.errors import PreflightError, RunLocked
from protocol.keys import ClientKey, ServerKey
from protocol.messages import Role

ZAP_DOMAIN = "tether"
MAX_FRAME_BYTES = 9 << 20  # a little over the codec's largest frame; a larger one closes the connection
SILENCE_S = 30.0  # after it a host is dead; more than a channel waits, for a large message on a slow line is silence
SEND_QUEUE = 4096  # messages towards one peer; a peer that reads slower loses answers and asks again


def broker_context() -> zmq.Context[Any]:
    """The broker's context, with an io thread for each of its two sockets.

    Encrypting a chunk takes its thread 10 ms: with four readers of weights a ping took 200 ms (p99) through the same
    thread, 30 ms through one of its own.
    """
    return zmq.Context(io_threads=2)


class AllowList:
    """Public key -> role; the authenticator's credentials provider. Replaced whole, so no lock is needed."""

    def __init__(self, roles: dict[str, Role]) -> None:
        self.roles = roles
        self.num_strangers = 0  # connections with an unlisted key; only the authenticator's thread counts

    def callback(self, domain: str, key: bytes) -> bool:
        listed = key.decode() in self.roles
        self.num_strangers += not listed
        return listed


def start_authenticator(context: zmq.Context[Any], allow: AllowList) -> ThreadAuthenticator:
    """The ZAP handler of this context. Must run before the first bind."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(ZAP_DOMAIN, credentials_provider=allow)
    return authenticator


def bind_router(context: zmq.Context[Any], address: str, key: ServerKey, io_thread: int = 0) -> zmq.Socket[Any]:
    """Its connections are served by that thread of the context. Raises RunLocked if the port is taken."""
    socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    _common(socket)
    socket.setsockopt(zmq.AFFINITY, 1 << io_thread)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that left is an error, not silence
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # nobody takes over another's routing id
    socket.setsockopt(zmq.BACKLOG, 256)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)  # half-open connections are dropped
    socket.curve_server = True
    socket.curve_publickey = key.public.encode()
    socket.curve_secretkey = key.secret.encode()
    socket.zap_domain = ZAP_DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a ZAP handler nobody gets in
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise RunLocked(
            f"the broker needs {address}, but {os.strerror(error.errno or 0).lower()}; end the process that holds "
            "the port, or choose another with --bind tcp://HOST:PORT"
        ) from None
    return socket


def connect_dealer(context: zmq.Context[Any], address: str, key: ClientKey) -> Any:
    """A connected DEALER of the context's own kind (plain or asyncio)."""
    socket = _dealer(context, key)
    socket.connect(address)
    return socket


def _dealer(context: zmq.Context[Any], key: ClientKey | None) -> Any:
    socket = context.socket(zmq.DEALER)
    _common(socket)
    socket.setsockopt(zmq.ROUTING_ID, b"t" + os.urandom(15))  # random: a fixed one would be black-holed after a crash
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
    if key is not None:
        socket.curve_serverkey = key.server.encode()
        socket.curve_publickey = key.public.encode()
        socket.curve_secretkey = key.secret.encode()
    return socket


def self_test(context: zmq.Context[Any], address: str, server: ServerKey, timeout_s: float = 5.0) -> None:
    """Connect without a key, then with a random one, and require refusal: milliseconds each.

    Raises PreflightError if the socket lets either in.
    """
    public, secret = zmq.curve_keypair()
    stranger = ClientKey(Role.STATUS, public.decode(), secret.decode(), server.public)
    hung_up = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL  # whichever is seen first
    _require_refusal(context, address, None, hung_up, "a peer without a key", timeout_s)
    not_listed = zmq.EVENT_HANDSHAKE_FAILED_AUTH  # nobody else at this port would say so
    _require_refusal(context, address, stranger, not_listed, "a key that is not listed", timeout_s)


def _require_refusal(
    context: zmq.Context[Any], address: str, key: ClientKey | None, refusals: int, who: str, timeout_s: float
) -> None:
    socket = _dealer(context, key)
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | refusals)
    try:
        socket.connect(address)
        if not monitor.poll(int(timeout_s * 1000)):
            raise PreflightError(
                f"expected {address} to refuse {who}, it gave no verdict in {timeout_s} s; is the port really ours? "
                "End whatever else listens there, or choose another with --bind tcp://HOST:PORT"
            )
        if not recv_monitor_message(monitor)["event"] & refusals:
            raise PreflightError(
                f"expected {address} to refuse {who}, it was admitted; the run does not start without authentication: "
                "reinstall pyzmq (make setup), whose ZeroMQ library must support CURVE"
            )
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)


def _common(socket: Any) -> None:
    socket.setsockopt(zmq.LINGER, 0)  # what matters is asked again; nothing may hang at exit
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
    socket.setsockopt(zmq.RCVHWM, SEND_QUEUE)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)  # a dead host is noticed by the io thread
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENCE_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(SILENCE_S * 1000))
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
