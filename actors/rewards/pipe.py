"""A reward worker's side of its pipe: length-prefixed msgpack on its first two descriptors.

Runs in every reward worker. That nothing else can write into the pipe, and no process that reward code forks answers
beside its parent, rests on `start_of_worker`.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import msgpack

from protocol.parent import leave_with


def start_of_worker() -> tuple[BinaryIO, BinaryIO]:
    """Where calls come from and answers go. From here on what the process prints goes to stderr.

    And it ends when its parent does. What reward code forks finds no further call when its function returns, and ends.
    """
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.register_at_fork(after_in_child=lambda: _leave_to_parent(incoming.fileno(), outgoing.fileno()))
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    leave_with(os.getppid())  # also when its code hangs and never sees that its pipe is closed
    return incoming, outgoing


def _leave_to_parent(*descriptors: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


def read(file: BinaryIO) -> dict[str, Any] | None:
    """The next call; None when there are no more."""
    head = file.read(4)
    if len(head) < 4:
        return None
    return dict(msgpack.unpackb(file.read(struct.unpack("<I", head)[0])))


def write(file: BinaryIO, fields: dict[str, Any]) -> None:
    body = msgpack.packb(fields)
    file.write(struct.pack("<I", len(body)) + body)
    file.flush()
