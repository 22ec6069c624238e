"""Frames that were tampered with: damaged ones, which a checksum betrays, and undermined ones, whose checksums fit."""

from __future__ import annotations

import copy
import random
import struct
import zlib
from typing import Any

import msgpack

from protocol.codec import Header, encode
from protocol.messages import Message

HEADER = struct.Struct("<4sHHIHHQQQI")
LENGTH, NUM_ARRAYS, CHECKSUM = 3, 4, 9  # places in it
NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, None, True, False),
    *("", "x" * 129, "x" * 5000, "\u2028\x1b[0m", "learner", b"", b"\0" * 17),
    *([], {}, [[]], [0, 0, 0], {"a": None}),
)


def frames_of(message: Message, header: Header) -> list[bytes]:
    return [bytes(frame) for frame in encode(message, header)]


def repaired(frames: list[bytes]) -> list[bytes]:
    """The same with lengths, counts and checksums of the header as a sender would write them."""
    fields = list(HEADER.unpack_from(frames[0]))
    fields[LENGTH], fields[NUM_ARRAYS], fields[CHECKSUM] = len(frames[1]), len(frames) - 2, zlib.crc32(frames[1])
    head = HEADER.pack(*fields)
    return [head + struct.pack("<I", zlib.crc32(head)), *frames[1:]]


def damaged(source: list[bytes], other: list[bytes], rng: random.Random) -> list[bytes]:
    """Something that is neither message: bits flipped, cut, lengthened, spliced, frames swapped, lost or added."""
    while True:
        frames = [bytearray(frame) for frame in source]
        here, there = rng.randrange(len(frames)), rng.randrange(len(other))
        target, foreign = frames[here], other[there]
        match rng.randrange(8):
            case 0 if target:
                target[rng.randrange(len(target))] ^= 1 << rng.randrange(8)
            case 1:
                del target[rng.randrange(len(target) + 1) :]
            case 2:
                target += rng.randbytes(rng.randrange(1, 9))
            case 3:
                at = rng.randrange(min(len(target), len(foreign)) + 1)
                target[at:] = foreign[at:]
            case 4:
                frames[here] = bytearray(foreign)
            case 5:
                frames[here], frames[0] = frames[0], frames[here]
            case 6:
                frames.insert(here, bytearray(rng.randbytes(rng.randrange(40))))
            case 7 if len(frames) > 1:
                del frames[here]
        made = [bytes(frame) for frame in frames]
        if made not in (source, other):
            return made


def undermined(source: list[bytes], rng: random.Random) -> list[bytes]:
    """Another content under fitting checksums: values of the map, bytes of it, or an array."""
    head, packed, *blobs = source
    how = rng.randrange(4)
    if blobs and how == 0:
        return repaired([head, *_with_another_array(packed, blobs, rng)])
    if how == 1:
        changed = bytearray(packed)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return repaired([head, bytes(changed), *blobs])
    return repaired([head, msgpack.packb(_with_another_value(msgpack.unpackb(packed), rng)), *blobs])


def _with_another_value(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A value somewhere in the map replaced, taken away, or added."""
    container: Any = body
    place: Any = rng.choice(list(body))
    while isinstance(container[place], list | dict) and container[place] and rng.random() < 0.7:
        container = container[place]
        place = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    how = rng.random()
    if how < 0.1:
        del container[place]
    elif how < 0.2 and isinstance(container, list):
        container.insert(0, copy.deepcopy(rng.choice(NASTY)))
    elif how < 0.2:
        container["unknown"] = copy.deepcopy(rng.choice(NASTY))
    else:
        container[place] = copy.deepcopy(rng.choice(NASTY))
    return body


def _with_another_array(packed: bytes, blobs: list[bytes], rng: random.Random) -> list[bytes]:
    """Four of its bytes changed, or half of it gone, declared as it is now."""
    body = msgpack.unpackb(packed)
    place = rng.randrange(len(blobs))
    blob, declared = bytearray(blobs[place]), body["_"][place]
    at = 4 * rng.randrange(len(blob) // 4 + 1)
    blob[at : at + 4] = rng.choice([rng.randbytes(4), struct.pack("<f", float("nan")), struct.pack("<i", -1)])
    if rng.random() < 0.3:
        del blob[len(blob) // 2 // 4 * 4 :]
    width = {"int32": 4, "float32": 4, "uint8": 1, "bool": 1}[declared[1]]
    declared[2:] = [[len(blob) // width], zlib.crc32(blob)]
    return [msgpack.packb(body), *blobs[:place], bytes(blob), *blobs[place + 1 :]]
