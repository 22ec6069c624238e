"""The codec, for every message that there is: what goes in comes out, and nothing near it is taken for it."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import outcomes
from broker.checks import trajectory
from protocol.codec import MAX_ARRAY_BYTES, MAX_BODY_BYTES, MAX_FRAMES, Header, can_travel, decode, encode
from protocol.errors import ProtocolError
from protocol.messages import MESSAGES, Bytes, Message, Result
from protocol.types import Completion, FinishReason, Lease, LeaseKind, Prompt, VersionSpan
from tests.frames import frames_of, repaired
from tests.message_values import Declared, fields, fullest, least, right, same, wrong

HEADER = Header(7, 8, 9)
U64 = st.integers(0, (1 << 64) - 1)
every_message = pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)


@every_message
@settings(max_examples=20)
@given(data=st.data(), header=st.builds(Header, U64, U64, U64))
def test_a_message_comes_back_as_it_was_sent(kind: type[Message], data: st.DataObject, header: Header) -> None:
    sent = kind(**{name: data.draw(right(one), label=name) for name, one in fields(kind).items()})
    frames = encode(sent, header)
    assert 2 <= len(frames) <= MAX_FRAMES
    assert len(frames[1]) <= MAX_BODY_BYTES
    assert all(len(frame) <= MAX_ARRAY_BYTES for frame in frames[2:])
    came, back = decode([bytes(frame) for frame in frames])
    assert came == header
    assert type(back) is kind
    for name in fields(kind):
        assert same(getattr(sent, name), getattr(back, name)), name


@every_message
def test_a_message_with_every_field_at_its_limit_goes_through(kind: type[Message]) -> None:
    """No field may be declared larger than the codec lets through."""
    sent = kind.model_validate({name: fullest(one) for name, one in fields(kind).items()})
    back = decode(frames_of(sent, HEADER)).message
    assert all(same(getattr(sent, name), getattr(back, name)) for name in fields(kind))


def tampered(kind: type[Message], change: dict[str, Any], without: str = "") -> list[bytes]:
    """The least message of its kind with some plain fields replaced, and header and checksums as they should be."""
    message = kind.model_validate({name: least(one) for name, one in fields(kind).items()})
    head, packed, *blobs = frames_of(message, HEADER)
    body = msgpack.unpackb(packed) | change
    body.pop(without, None)
    return repaired([head, msgpack.packb(body), *blobs])


def refusal(frames: list[bytes], what: str) -> ProtocolError:
    """Why they are refused. Fails if they are not; any other error goes through."""
    try:
        decode(frames)
    except ProtocolError as error:
        return error
    raise AssertionError(f"{what} is taken")


def plain_fields(kind: type[Message]) -> Iterator[tuple[str, Declared]]:
    return ((name, one) for name, one in fields(kind).items() if one.array is None)


@every_message
def test_a_field_that_is_not_as_declared_is_refused_by_its_name(kind: type[Message]) -> None:
    assert type(decode(tampered(kind, {})).message) is kind
    for name, one in plain_fields(kind):
        for what, value in wrong(one):
            refused = refusal(tampered(kind, {name: value}), f"{kind.__name__}.{name} that is {what}")
            if can_travel(value):
                assert refused.code == "fields"
                assert refused.text.startswith(f"{kind.__name__}.{name}"), what
            else:
                assert refused.code == "msgpack", "it is longer than anything may be"


@every_message
def test_a_field_that_is_missing_or_unknown_is_refused_by_its_name(kind: type[Message]) -> None:
    with pytest.raises(ProtocolError, match=rf"^fields: {kind.__name__}\.surplus: "):
        decode(tampered(kind, {"surplus": 0}))
    for name, _ in plain_fields(kind):
        frames = tampered(kind, {}, without=name)
        if kind.model_fields[name].is_required():
            with pytest.raises(ProtocolError, match=rf"^fields: {kind.__name__}\.{name}: "):
                decode(frames)
        else:
            assert getattr(decode(frames).message, name) == kind.model_fields[name].default


@every_message
def test_a_list_or_map_without_a_limit_of_its_own_ends_at_the_codecs(kind: type[Message]) -> None:
    for name, one in plain_fields(kind):
        if one.kind in (list, dict) and one.max_length is None:
            endless = [0] * 20_000 if one.kind is list else {str(n): 0 for n in range(20_000)}
            with pytest.raises(ProtocolError, match="malformed map"):
                decode(tampered(kind, {name: endless}))


def array_faults(dtype: str, shape: list[int], blob: bytes) -> Iterator[tuple[str, Any, bytes]]:
    """(what is wrong, [dtype, shape, checksum] as declared, bytes) of everything near one array."""
    crc, width = zlib.crc32(blob), np.dtype(dtype).itemsize
    for other in ("int32", "int64", "float32", "float64", "uint8", "bool", "complex64", "object", "<i4", ""):
        if other != dtype:
            yield f"called {other}", [other, shape, crc], blob
    one_more = blob + blob[:width]
    for what, bad in (
        ("one axis more", [1, *shape]),
        ("one axis less", shape[1:] and [math.prod(shape), *shape[2:]] if len(shape) > 1 else []),
        ("one element more", [shape[0] + 1, *shape[1:]]),
        ("one element less", [shape[0] - 1, *shape[1:]]),
        ("negative", [-shape[0], *[-n for n in shape[1:]]]),
        ("a fraction", [float(shape[0]), *shape[1:]]),
        ("a truth", [True, *shape[1:]]),
        ("endless", [1 << 62, *shape[1:]]),
        ("a text", "2"),
        ("nothing", None),
    ):
        yield f"a shape: {what}", [dtype, bad, crc], blob
    yield "longer than its shape", [dtype, shape, zlib.crc32(one_more)], one_more
    yield "half an element short", [dtype, shape, zlib.crc32(blob[:-1])], blob[:-1]
    yield "another checksum", [dtype, shape, crc ^ 1], blob
    yield "a checksum that is a text", [dtype, shape, str(crc)], blob
    yield "other bytes", [dtype, shape, crc], bytes(len(blob) - 1) + b"\7"
    if dtype == "bool":
        odd = bytes(len(blob) - 1) + b"\2"
        yield "neither true nor false", [dtype, shape, zlib.crc32(odd)], odd


@every_message
def test_an_array_that_is_not_as_declared_is_refused_by_its_name(kind: type[Message]) -> None:
    head, packed, *blobs = tampered(kind, {})
    names = [name for name, one in fields(kind).items() if one.array is not None]
    for place, name in enumerate(names):
        body = msgpack.unpackb(packed)
        _, dtype, shape, _ = body["_"][place]
        for what, entry, blob in array_faults(dtype, shape, blobs[place]):
            body["_"][place] = [name, *entry]
            frames = [head, msgpack.packb(body), *blobs[:place], blob, *blobs[place + 1 :]]
            refused = refusal(repaired(frames), f"{kind.__name__}.{name} that is {what}")
            assert re.search(rf"\b{name}\b", refused.text), what


@every_message
def test_arrays_that_are_missing_too_many_or_in_another_order_are_refused(kind: type[Message]) -> None:
    head, packed, *blobs = tampered(kind, {})
    body = msgpack.unpackb(packed)
    surplus = ["surplus", "uint8", [1], zlib.crc32(b"x")]
    faults: list[tuple[list[Any] | None, list[bytes]]] = [([*body["_"], surplus], [*blobs, b"x"]), (None, blobs)]
    if blobs:
        faults += [(body["_"][1:], blobs[1:]), (body["_"], blobs[1:]), (body["_"][1:], blobs)]
        faults += [([surplus, *body["_"][1:]], [b"x", *blobs[1:]])]
    if len(blobs) > 1:
        faults += [(body["_"][::-1], blobs[::-1]), ([body["_"][0]] * len(blobs), [blobs[0]] * len(blobs))]
    for entries, came in faults:
        changed = {name: value for name, value in body.items() if name != "_"}
        changed |= {} if entries is None else {"_": entries}
        with pytest.raises(ProtocolError, match="arrays"):
            decode(repaired([head, msgpack.packb(changed), *came]))


def test_an_array_may_fill_a_frame_and_not_a_byte_more() -> None:
    for size in (MAX_ARRAY_BYTES, MAX_ARRAY_BYTES + 1):
        frames = frames_of(Bytes(data=np.ones(size, np.uint8)), HEADER)
        if size <= MAX_ARRAY_BYTES:
            assert same(Bytes(data=np.ones(size, np.uint8)), decode(frames).message)
        else:
            with pytest.raises(ProtocolError, match="arrays: data: "):
                decode(frames)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    length = draw(st.integers(1, 8))
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))})
    spans = tuple(VersionSpan(n, start, end) for n, (start, end) in enumerate(pairwise(cuts)))
    floats = st.floats(width=32, max_value=0) | st.just(math.nan)
    return Completion(
        np.array(draw(st.lists(st.integers(0, (1 << 31) - 1), min_size=length, max_size=length)), np.int32),
        np.array(draw(st.lists(floats, min_size=length, max_size=length)), np.float32),
        spans,
        draw(st.sampled_from(FinishReason)),
        draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length).map(np.array)),
    )


ODD_TEXT = st.text(st.sampled_from("a é\0\u2028\U0001f600\ud800\udfff"), min_size=1, max_size=20)
LEASE = Lease(LeaseKind.TRAIN, Prompt(5, 2, np.arange(3, dtype=np.int32)), 4, 8, 3, 0, 30.0)


@settings(max_examples=60)
@given(
    made=completions(),
    sample=st.integers(0, 7),
    rewards=st.dictionaries(st.text(max_size=9), st.none() | st.floats(-9, 9)),
    metrics=st.dictionaries(st.text(max_size=9), st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    answers=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=5),
)
def test_a_completion_reaches_the_broker_as_the_engine_gave_it(
    made: Completion, sample: int, rewards: dict[str, float | None], metrics: dict[str, float], answers: dict[str, str]
) -> None:
    sent = outcomes.result(LEASE, sample, 3, made, 0.5, rewards, metrics, answers)
    back = decode(frames_of(sent, HEADER)).message
    assert isinstance(back, Result)
    found = trajectory(back)
    assert (found.prompt, found.attempt, found.sample, found.error) == (5, 4, sample, "")
    assert (found.reward, found.rewards, found.metrics, found.answers) == (0.5, rewards, metrics, answers)
    assert found.completion is not None
    for name in Completion.__slots__:
        assert same(getattr(made, name), getattr(found.completion, name)), name


@settings(max_examples=60)
@given(error=ODD_TEXT, sample=st.integers(0, 7))
def test_an_error_in_any_characters_reaches_the_broker(error: str, sample: int) -> None:
    """A user's reward function may raise what is not Unicode."""
    back = decode(frames_of(outcomes.error_result(LEASE, sample, 3, error), HEADER)).message
    assert isinstance(back, Result)
    found = trajectory(back)
    assert (found.sample, found.completion) == (sample, None)
    assert found.error == error.encode(errors="replace").decode()
