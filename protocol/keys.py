"""CURVE keys of a run: who may connect, and as what.

`make_run_keys` writes `keys/` (0700) into the run folder: the server's pair, and one client file (0600) per role. A
client file holds its own pair, its role and the server's public key, so `--key FILE` is all that a standalone
generator needs. Secrets are read from files only: never from arguments or the environment, and never logged.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from protocol.errors import ConfigError, PreflightError
from protocol.messages import Role

_FORMAT = "tether-key-1"


@dataclass(frozen=True, slots=True, repr=False)
class ServerKey:
    """The broker's pair, z85."""

    public: str
    secret: str


@dataclass(frozen=True, slots=True, repr=False)
class ClientKey:
    """One peer's pair, z85, with the role it has and the server it trusts."""

    role: Role
    public: str
    secret: str
    server: str

    @property
    def fingerprint(self) -> str:
        return self.public[:8]


def require_curve() -> None:
    """Raises PreflightError if the ZeroMQ library here cannot encrypt: it can be built without CURVE."""
    if not zmq.has("curve"):
        raise PreflightError(
            f"every connection is encrypted with CURVE, which the ZeroMQ library of this Python ({zmq.zmq_version()}) "
            "was built without; install pyzmq as a wheel: pip install --force-reinstall --only-binary pyzmq pyzmq"
        )


def make_run_keys(run_dir: Path) -> None:
    """Write the server's key and one client key per role, unless they are there already.

    The server's comes last: without it, whatever lies there was left by a start that broke off.
    """
    folder = run_dir / "keys"
    if (folder / "server.key").exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    public, secret = _pair()
    for role in Role:
        own_public, own_secret = _pair()
        _write(
            folder / f"{role}.key", {"role": role.value, "public": own_public, "secret": own_secret, "server": public}
        )
    _write(folder / "server.key", {"public": public, "secret": secret})


def read_server_key(run_dir: Path) -> ServerKey:
    fields = _read(run_dir / "keys" / "server.key", ("public", "secret"))
    return ServerKey(fields["public"], fields["secret"])


def read_client_key(path: Path) -> ClientKey:
    """Raises ConfigError if the file is missing, malformed, or readable by others."""
    fields = _read(path, ("role", "public", "secret", "server"))
    return ClientKey(Role(fields["role"]), fields["public"], fields["secret"], fields["server"])


def allowed_keys(run_dir: Path) -> dict[str, Role]:
    """Public key -> role of every client key in the run folder."""
    found: dict[str, Role] = {}
    for path in sorted((run_dir / "keys").glob("*.key")):
        if path.name != "server.key":
            key = read_client_key(path)
            found[key.public] = key.role
    return found


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _write(path: Path, fields: dict[str, str]) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"format": _FORMAT, **fields}, file)


def _read(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    require_curve()
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"expected a key file, found none at {path}; every run writes its keys to RUN/keys/"
        ) from None
    except OSError as error:
        reason = (error.strerror or "it cannot be read").lower()
        raise ConfigError(f"expected a key file that this user can read at {path}, but {reason}") from None
    except ValueError:
        raise ConfigError(
            f"expected a key file of Tether at {path}, it is not JSON; copy it again from RUN/keys/"
        ) from None
    if mode & 0o077:
        raise ConfigError(
            f"the key file must be readable by its owner only, its mode is {mode:o}: {path}; run chmod 600 {path}"
        )
    if (
        not isinstance(fields, dict)
        or fields.get("format") != _FORMAT
        or not all(isinstance(fields.get(n), str) for n in names)
    ):
        raise ConfigError(f"expected a {_FORMAT} file with {', '.join(names)} at {path}; copy it again from RUN/keys/")
    return fields
