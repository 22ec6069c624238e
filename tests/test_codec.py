"""The codec gives back exactly what was sent, and refuses everything else without ever raising anything but
ProtocolError.
"""

import random

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Header, _decode_array, decode, encode
from protocol.errors import ProtocolError
from protocol.fields import ArrayField
from protocol.messages import MESSAGES, Hello, LeaseItem, Leases, Message, Pull, Result, Role
from tests.frames import damaged, repaired

HEADER = Header(epoch=7, session=8, sequence=9)


def result(tokens: list[int], error: str = "") -> Result:
    array = np.array(tokens, np.int32)
    return Result(
        epoch=3,
        prompt=5,
        attempt=1,
        sample=2,
        error=error,
        spans=[(0, 0, len(tokens))],
        reward=0.5,
        rewards={"gsm8k": 0.5, "other": None},
        tokens=array,
        behavior_logprobs=array.astype(np.float32) / 7,
        observed=np.zeros(0, np.bool_),
    )


def frames_of(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in encode(message, HEADER)]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50), st.text(max_size=20))
def test_a_result_comes_back_as_it_was_sent(tokens: list[int], error: str) -> None:
    sent = result(tokens, error)
    header, back = decode(frames_of(sent))
    assert header == HEADER
    assert isinstance(back, Result)
    np.testing.assert_array_equal(back.tokens, sent.tokens)
    np.testing.assert_array_equal(back.behavior_logprobs, sent.behavior_logprobs)
    assert back.tokens.dtype == np.int32
    plain = ("prompt", "attempt", "sample", "error", "spans", "reward", "rewards", "finish_reason")
    assert [getattr(back, name) for name in plain] == [getattr(sent, name) for name in plain]


def test_leases_with_their_columns_come_back_as_they_were_sent() -> None:
    item = LeaseItem(
        kind="train",
        number=1,
        row=2,
        attempt=3,
        samples=4,
        version=5,
        failures=0,
        ttl_s=30.0,
        num_tokens=2,
        columns={"answer": "#### 12", "extra": {"a": [1, 2.5, None]}},
    )
    _, back = decode(frames_of(Leases(leases=[item], tokens=np.array([4, 5], np.int32))))
    assert isinstance(back, Leases)
    assert back.leases == [item]
    assert back.tokens.tolist() == [4, 5]


def test_ten_thousand_mutated_messages_are_refused() -> None:
    """Bit flips, cuts, splices and swapped frames: ProtocolError comes out, always and nothing else."""
    rng = random.Random(1)
    originals = [frames_of(result(list(range(n)))) for n in (0, 1, 30)]
    originals.append(frames_of(Hello(role=Role.GENERATOR.value, name="generator-0", incarnation=3)))
    for _ in range(10_000):
        frames = damaged(rng.choice(originals), rng.choice(originals), rng)
        with pytest.raises(ProtocolError):
            decode(frames)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=80), max_size=6))
def test_garbage_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


def test_a_message_of_another_protocol_version_is_refused_with_words() -> None:
    frames = frames_of(Pull(version=0, digest="", room=1))
    other = bytearray(frames[0])
    other[4] = 99
    with pytest.raises(ProtocolError, match="protocol 99 was sent, 3 is spoken here"):
        decode([bytes(other), *frames[1:]])


def test_a_msgpack_bomb_is_refused_before_it_grows() -> None:
    bomb = msgpack.packb({"leases": [[]] * 100_000})
    frames = frames_of(Pull(version=0, digest="", room=1))
    with pytest.raises(ProtocolError, match="length"):
        decode([frames[0], bomb])
    with pytest.raises(ProtocolError, match="malformed map"):
        decode(repaired([frames[0], bomb]))


def test_a_field_of_the_wrong_type_is_refused_by_name() -> None:
    frames = frames_of(Pull(version=0, digest="", room=1))
    body = msgpack.packb({"version": "0", "digest": "", "room": 1, "_": []})
    with pytest.raises(ProtocolError, match=r"Pull.version"):
        decode(repaired([frames[0], body]))


def test_an_unknown_field_is_refused_by_name() -> None:
    frames = frames_of(Pull(version=0, digest="", room=1))
    body = msgpack.packb({"version": 0, "digest": "", "room": 1, "extra": 1, "_": []})
    with pytest.raises(ProtocolError, match=r"Pull.extra"):
        decode(repaired([frames[0], body]))


def test_every_message_has_one_number() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert set(MESSAGES) == set(Message.__subclasses__())


@pytest.mark.parametrize("shape", [[0, 1 << 62], [1 << 62, 0], [0, 1 << 63]])
def test_an_empty_array_of_an_impossible_shape_is_refused(shape: list[int]) -> None:
    """numpy cannot make it, and would say so with an error of its own."""
    with pytest.raises(ProtocolError, match="rewards"):
        _decode_array(["rewards", "float32", shape, 0], "rewards", ArrayField("float32", ndim=2), b"")
