"""The folder of a run: who may use it, and what the cluster command writes into it before anything starts.

Its lock is held as long as the cluster command lives, so two runs never share a folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from protocol.addresses import Addresses
from protocol.errors import ConfigError, PreflightError, RunLocked
from protocol.keys import make_run_keys
from protocol.settings import Settings


class RunFolder:
    """A run's folder, locked. `create` and `reopen` make one; the lock goes with the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path / "lock")

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Raises ConfigError if a run lies there already, RunLocked if it still goes on."""
        _make(path)
        folder = cls(path)
        if (path / "config.yaml").exists():
            raise ConfigError(
                f"{path} holds a run already; continue it with --resume {path}, or choose another --run-name"
            )
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Raises ConfigError if no run lies there, RunLocked if it still goes on."""
        check_run(path)
        return cls(path)

    def write(self, settings: Settings, command: Sequence[str], addresses: Addresses) -> None:
        """Everything that the processes of the run read when they start."""
        settings.save(self.path / "config.yaml")
        with (self.path / "command.txt").open("a") as file:
            file.write(shlex.join(command) + "\n")
        broker = self.path / "broker.json"
        run_id = json.loads(broker.read_text())["run_id"] if broker.exists() else secrets.token_hex(8)
        fields = {"control": addresses.control, "bulk": addresses.bulk, "run_id": run_id}
        broker.write_text(json.dumps(fields) + "\n")
        make_run_keys(self.path)


def check_run(path: Path) -> None:
    """Raises ConfigError unless a run lies there."""
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"expected a run with a config.yaml to resume, found none in {path}; --resume takes its folder"
        )


def choose_addresses(bind: str) -> Addresses:
    """Where the broker will listen: `bind`, or free ports of the loopback. Raises RunLocked if a port is taken."""
    if not bind:
        return Addresses(*(f"tcp://127.0.0.1:{port}" for port in free_ports(2)))
    addresses = Addresses.from_url(bind)
    for address in addresses:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise RunLocked(
                    f"--bind {bind} needs {address}, but {reason}; end what holds the port, or choose another HOST:PORT"
                ) from None
    return addresses


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PreflightError(f"the run writes into {path}, but {reason}; choose another place with --out DIR") from None


def _lock(path: Path) -> int:
    """Raises RunLocked if another process holds it."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PreflightError(
            f"the run writes into {path.parent}, but {reason}; choose another place with --out DIR"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise RunLocked(
            f"{path.parent} is used by a run that goes on (process {holder or 'unknown'}); end it first, "
            "or choose another --run-name"
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock
