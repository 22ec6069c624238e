"""Where a run's broker is, and which processes share memory with us."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

from protocol.errors import ConfigError


class Addresses(NamedTuple):
    """The broker's two sockets. The bulk port of a standalone generator's `--connect` is the control port + 1."""

    control: str
    bulk: str

    @classmethod
    def read(cls, run_dir: Path) -> Addresses:
        path = run_dir / "broker.json"
        try:
            fields = json.loads(path.read_text())
            return cls(fields["control"], fields["bulk"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"expected the broker's addresses in {path}, got {type(error).__name__}; is {run_dir} a run?"
            ) from None

    @staticmethod
    def run_id(run_dir: Path) -> str:
        """The random name that a run was given when its folder was made."""
        return str(json.loads((run_dir / "broker.json").read_text())["run_id"])

    @classmethod
    def from_url(cls, url: str) -> Addresses:
        """Raises ConfigError unless the URL is tcp://HOST:PORT."""
        host, colon, port = url.removeprefix("tcp://").rpartition(":")
        if not (url.startswith("tcp://") and colon and host and port.isdecimal() and 0 < int(port) < 65535):
            raise ConfigError(
                f"expected tcp://HOST:PORT with a port below 65535, got {url}; a running job's is in RUN/broker.json"
            )
        return cls(url, f"tcp://{host}:{int(port) + 1}")


def host_identity() -> str:
    """Equal on processes that see the same /dev/shm: the machine's boot and the device behind the folder."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/dev/shm').st_dev}"
    except OSError:
        return socket.gethostname()
