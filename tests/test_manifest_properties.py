"""Manifests of any size through their bytes, and any change to those bytes: refused, by SnapshotError alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import SnapshotError
from protocol.weights import CHUNK_BYTES, ITEM_BYTES, Manifest, lay_out

SHAPES = st.lists(st.integers(1, 600), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(ITEM_BYTES)), SHAPES), min_size=1, max_size=4
)
NASTY_JSON = (
    *(None, True, False, 0, 1, -1, 2, 64, 1 << 20, (1 << 20) + 0.5, 1 << 63, 1 << 400, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "float64", "\ud800", [], [[]], [0], [1], [-1], {}, {"a": 1}),
)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Up to a few gigabytes, of which nothing exists."""
    specs = lay_out((name, dtype, shape) for name, (dtype, shape) in draw(TENSORS).items())
    chunk_bytes = draw(st.integers(1 << 20, CHUNK_BYTES))
    num_chunks = -(-(specs[-1].offset + specs[-1].nbytes) // chunk_bytes)
    first = draw(DIGESTS)
    digests = tuple(f"{index:04x}{first[4:]}" for index in range(num_chunks))
    return Manifest(specs, digests, chunk_bytes, draw(st.just("") | DIGESTS))


@settings(max_examples=60)
@given(manifest=manifests())
def test_a_manifest_comes_back_from_its_bytes_with_its_identity(manifest: Manifest) -> None:
    back = Manifest.from_bytes(manifest.to_bytes())
    assert (back, back.digest) == (manifest, manifest.digest)
    ends = [manifest.chunk_range(index) for index in range(len(manifest.chunk_digests))]
    assert [start for start, _ in ends] == [0, *[end for _, end in ends[:-1]]]
    assert ends[-1][1] == manifest.total_bytes == sum(end - start for start, end in ends)
    assert all(spec.nbytes == prod(spec.shape) * ITEM_BYTES[spec.dtype] for spec in back.tensors)


def places(container: Any) -> Iterator[tuple[Any, Any]]:
    """(list or map, key) of every value in it, to any depth."""
    for place in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, place
        if isinstance(container[place], dict | list):
            yield from places(container[place])


def packed(fields: Any) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def test_a_manifest_with_anything_else_in_any_place_is_refused() -> None:
    """Or, if the change leaves a whole manifest, it is another one by its digest."""
    specs = lay_out([("embed", "float32", (1500, 1000)), ("norm", "bfloat16", ()), ("head", "float16", (3, 2))])
    good = Manifest(specs, ("0" * 64, "f" * 64), base="b" * 64)
    fields = json.loads(good.to_bytes())
    assert packed(fields) == good.to_bytes()
    num_whole = 0
    for container, place in places(fields):
        before = container[place]
        for value in NASTY_JSON:
            container[place] = value
            num_whole += is_another_manifest(packed(fields), good)
        del container[place]
        num_whole += is_another_manifest(packed(fields), good)
        container.insert(place, before) if isinstance(container, list) else container.update({place: before})
    assert packed(fields) == good.to_bytes()
    assert num_whole == 12, (
        "three other names for each tensor, [1] for a shape of [], or the last tensor or the base left out"
    )


def is_another_manifest(data: bytes, good: Manifest) -> bool:
    if data == good.to_bytes():
        return False
    try:
        found = Manifest.from_bytes(data)
    except SnapshotError:
        return False
    assert (found.to_bytes(), found.digest != good.digest) == (data, True)
    return True


@settings(max_examples=60)
@given(manifest=manifests(), how=st.sampled_from(["space", "cut", "more", "order"]), data=st.data())
def test_a_manifest_has_one_form(manifest: Manifest, how: str, data: st.DataObject) -> None:
    """Else equal weights could have two identities."""
    good = manifest.to_bytes()
    bad = {
        "space": good.replace(b",", b", ", 1),
        "cut": good[: data.draw(st.integers(0, len(good) - 1))],
        "more": good + b"\n",
        "order": json.dumps(dict(reversed(json.loads(good).items())), separators=(",", ":")).encode(),
    }[how]
    with pytest.raises(SnapshotError, match=r"not a manifest|not in canonical form"):
        Manifest.from_bytes(bad)
