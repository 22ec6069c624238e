"""Messages to frames and back, refusing whatever is not exactly right.

    frame 0   header, 48 bytes little-endian (`_HEADER` below and its own crc32): a changed bit anywhere is refused
    frame 1   one msgpack map: the plain fields, and under "_" the declared arrays: [name, dtype, shape, crc32]
    frame 2.. the arrays' raw little-endian bytes, in that order

`decode` raises ProtocolError and nothing else, whatever the bytes are: the promise that no peer can crash a process
rests on it. Nothing is allocated from a declared size before the bytes have been seen to be there. That no peer can
make the broker stand still rests on `_max_body_bytes` and `_Containers`: what it may be asked is small to unpack.
"""

from __future__ import annotations

import math
import struct
import sys
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import msgpack
import numpy as np
from pydantic import ValidationError

from protocol.errors import ProtocolError
from protocol.fields import ArrayField
from protocol.messages import MESSAGES, PROTOCOL_VERSION, Hello, Message, Publish

MAGIC = b"TTHR"
_HEADER = struct.Struct("<4sHHIHHQQQI")  # ends with the map's crc32
_CHECKSUM = struct.Struct("<I")

MAX_BODY_BYTES = 8 << 20  # of what the broker says
MAX_QUESTION_BYTES = 288 << 10  # of what it is asked: the largest Beat, 4096 leases and 256 numbers, has 260 KiB
_LARGER_QUESTIONS = {Hello: (1 << 20) + (64 << 10), Publish: (4 << 20) + (64 << 10)}  # a ledger, a manifest
MAX_CONTAINERS = 8192  # lists and maps of a question: a byte each on the wire, 56 bytes and more once unpacked
MAX_ARRAY_BYTES = 8 << 20
MAX_ARRAYS = 20
MAX_FRAMES = 2 + MAX_ARRAYS
_UNPACK_LIMITS = {
    "max_str_len": 1 << 20,
    "max_bin_len": 4 << 20,
    "max_array_len": 16384,
    "max_map_len": 4096,
    "max_ext_len": 0,
    "strict_map_key": True,
}
_NUMBER = {kind: number for number, kind in enumerate(MESSAGES)}


class Header(NamedTuple):
    """What frame 0 says about a message, beside its type and sizes."""

    epoch: int  # of the broker's state as the sender knows it; 0: none yet
    session: int  # given in Welcome; 0 before
    sequence: int  # chosen by the asker, repeated by the answer; 0: a push


class Envelope(NamedTuple):
    """What can be said of a message before it is unpacked."""

    kind: type[Message]
    header: Header
    num_arrays: int


class Frames(NamedTuple):
    header: Header
    message: Message


class _Containers:
    """Counts the lists and maps of a message while it is unpacked."""

    def __init__(self, kind: type[Message]) -> None:
        self._left = MAX_CONTAINERS if kind.roles is not None else sys.maxsize

    def one(self, container: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many lists and maps")
        return container


def encode(message: Message, header: Header) -> list[bytes | memoryview]:
    """The frames of one message. Arrays are not copied when they are contiguous."""
    arrays = _array_fields(type(message))
    body: dict[str, Any] = {}
    declared: list[list[Any]] = []
    blobs: list[memoryview] = []
    for name in type(message).model_fields:
        value = getattr(message, name)
        if name in arrays:
            array = np.ascontiguousarray(value, dtype=np.dtype(arrays[name].dtype).newbyteorder("<"))
            blob = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
            declared.append([name, arrays[name].dtype, list(array.shape), zlib.crc32(blob)])
            blobs.append(blob)
        else:
            body[name] = _plain(value)
    body["_"] = declared
    packed = msgpack.packb(body, use_bin_type=True)
    head = _HEADER.pack(
        MAGIC, PROTOCOL_VERSION, _NUMBER[type(message)], len(packed), len(blobs), 0, *header, zlib.crc32(packed)
    )
    return [head + _CHECKSUM.pack(zlib.crc32(head)), packed, *blobs]


def read_envelope(frames: Sequence[bytes | memoryview]) -> Envelope:
    """What frame 0 says, after a look at the number of frames and at the map's checksum. Raises ProtocolError."""
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError("frames", f"expected 2 to {MAX_FRAMES} frames, got {len(frames)}")
    envelope = _decode_header(frames[0], frames[1])
    if envelope.num_arrays != len(frames) - 2:
        raise ProtocolError("frames", f"the header declares {envelope.num_arrays} arrays, {len(frames) - 2} came")
    return envelope


def decode(frames: Sequence[bytes | memoryview]) -> Frames:
    """The message in these frames. Raises ProtocolError if anything at all is wrong with them."""
    kind, header, num_arrays = read_envelope(frames)
    body = _decode_body(frames[1], kind)
    declared = body.pop("_", None)
    wanted = _array_fields(kind)
    if not isinstance(declared, list) or len(declared) != len(wanted) or len(declared) != num_arrays:
        raise ProtocolError("arrays", f"{kind.__name__} carries {len(wanted)} arrays, got {num_arrays}")
    for entry, (name, expected), blob in zip(declared, wanted.items(), frames[2:], strict=True):
        body[name] = _decode_array(entry, name, expected, blob)
    try:
        return Frames(header, kind.model_validate(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise ProtocolError("fields", f"{kind.__name__}.{where}: {first['msg'][:200]}") from None
    except (RecursionError, OverflowError, TypeError) as error:
        raise ProtocolError("fields", f"{kind.__name__}: {type(error).__name__}") from None


def can_travel(value: Any) -> bool:
    """Whether a plain value inside a message reaches the other side: JSON can hold what msgpack and UTF-8 cannot."""
    try:
        msgpack.unpackb(msgpack.packb(value), **_UNPACK_LIMITS)
    except (ValueError, OverflowError, TypeError):  # UnicodeEncodeError is a ValueError
        return False
    return True


def _decode_header(head: bytes | memoryview, packed: bytes | memoryview) -> Envelope:
    if len(head) != _HEADER.size + _CHECKSUM.size:
        raise ProtocolError("header", f"expected {_HEADER.size + _CHECKSUM.size} bytes, got {len(head)}")
    magic, version, number, length, num_arrays, reserved, epoch, session, sequence, crc = _HEADER.unpack_from(head)
    if magic != MAGIC or reserved:
        raise ProtocolError("header", "not a Tether message")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            "version", f"protocol {version} was sent, {PROTOCOL_VERSION} is spoken here; update the older side"
        )
    if _CHECKSUM.unpack_from(head, _HEADER.size) != (zlib.crc32(head[: _HEADER.size]),):
        raise ProtocolError("checksum", "the header does not match its checksum")
    if number >= len(MESSAGES):
        raise ProtocolError("type", f"unknown message type {number}")
    kind = MESSAGES[number]
    limit = _max_body_bytes(kind)
    if length != len(packed) or length > limit:
        raise ProtocolError("length", f"the header declares {length} bytes, {len(packed)} came, {limit} is the limit")
    if zlib.crc32(packed) != crc:
        raise ProtocolError("checksum", "the message's map does not match its checksum")
    return Envelope(kind, Header(epoch, session, sequence), num_arrays)


def _max_body_bytes(kind: type[Message]) -> int:
    """Of the map: what the broker is asked by many has to be small, what it answers may be large."""
    return MAX_BODY_BYTES if kind.roles is None else _LARGER_QUESTIONS.get(kind, MAX_QUESTION_BYTES)


def _decode_body(packed: bytes | memoryview, kind: type[Message]) -> dict[str, Any]:
    count = _Containers(kind).one
    hooks = {"list_hook": count, "object_hook": count, "ext_hook": _refuse_extension}
    try:
        body = msgpack.unpackb(packed, raw=False, timestamp=0, **hooks, **_UNPACK_LIMITS)
    except Exception as error:  # msgpack documents no common base of what malformed input raises
        raise ProtocolError("msgpack", f"malformed map: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise ProtocolError("msgpack", f"expected a map, got {type(body).__name__}")
    if not all(isinstance(key, str) for key in body):
        raise ProtocolError("msgpack", "keys must be strings")
    return body


def _decode_array(entry: Any, name: str, expected: ArrayField, blob: bytes | memoryview) -> np.ndarray[Any, Any]:
    if not (isinstance(entry, list) and len(entry) == 4 and entry[:2] == [name, expected.dtype]):
        raise ProtocolError("arrays", f"expected array {name} of {expected.dtype}, got {str(entry)[:80]}")
    shape, crc = entry[2], entry[3]
    if not (isinstance(shape, list) and len(shape) == expected.ndim and all(type(n) is int and n >= 0 for n in shape)):
        raise ProtocolError("arrays", f"{name}: expected {expected.ndim} dimensions, got {str(shape)[:80]}")
    dtype = np.dtype(expected.dtype).newbyteorder("<")
    if len(blob) > MAX_ARRAY_BYTES or math.prod(shape) * dtype.itemsize != len(blob):
        raise ProtocolError("arrays", f"{name}: shape {str(shape)[:80]} does not fit {len(blob)} bytes")
    if type(crc) is not int or zlib.crc32(blob) != crc:
        raise ProtocolError("checksum", f"{name}: the array does not match its checksum")
    if expected.dtype == "bool" and len(blob) and np.frombuffer(blob, np.uint8).max() > 1:
        raise ProtocolError("arrays", f"{name}: a boolean that is neither 0 nor 1")
    try:
        return np.frombuffer(blob, dtype).reshape(shape)
    except (ValueError, OverflowError):  # an empty array may declare a dimension that numpy cannot have
        raise ProtocolError("arrays", f"{name}: shape {str(shape)[:80]} is none") from None


@cache
def _array_fields(kind: type[Message]) -> dict[str, ArrayField]:
    """Name -> declaration of the fields that travel as raw frames, in the order of the class."""
    found: dict[str, ArrayField] = {}
    for name, info in kind.model_fields.items():
        marks = [mark for mark in info.metadata if isinstance(mark, ArrayField)]
        if marks:
            found[name] = marks[0]
    return found


def _plain(value: Any) -> Any:
    """What msgpack can write of a field: models become maps."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")
