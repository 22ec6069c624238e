"""Snapshots: what is written is read, what was tampered with is refused, and no half of one ever has the final name."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SnapshotError
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.weights import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES,
    ITEM_BYTES,
    Manifest,
    Snapshot,
    SnapshotAssembly,
    SnapshotWriter,
    lay_out,
)

LAYOUT = lay_out([("embed", "float32", (1000, 1500)), ("norm", "bfloat16", (7,)), ("scale", "float16", ())])


def write(folder: Path, seed: int = 0, version: int = 3) -> Snapshot:
    rng = np.random.default_rng(seed)
    writer = SnapshotWriter(folder, LAYOUT)
    for spec in LAYOUT:
        writer.view(spec)[:] = rng.integers(0, 256, spec.nbytes, dtype=np.uint8)
    return writer.finish(version)


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "a")
    read = Snapshot.open(tmp_path / "a", 3)
    read.verify()
    assert (read.version, read.digest, read.manifest) == (3, written.digest, written.manifest)
    rng = np.random.default_rng(0)
    for spec in LAYOUT:
        np.testing.assert_array_equal(read.view(spec), rng.integers(0, 256, spec.nbytes, dtype=np.uint8))
    assert [len(read.chunk(i)) for i in (0, 1)] == [CHUNK_BYTES, read.manifest.total_bytes - CHUNK_BYTES]


def test_equal_weights_have_one_digest_and_other_weights_another(tmp_path: Path) -> None:
    assert write(tmp_path / "a", seed=1, version=1).digest == write(tmp_path / "b", seed=1, version=2).digest
    assert write(tmp_path / "c", seed=2).digest != Snapshot.open(tmp_path / "a", 1).digest


def test_nothing_has_the_final_name_before_finish_and_only_the_owner_can_read_it(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "a", LAYOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["a.part"]
    with pytest.raises(SnapshotError, match="no snapshot at"):
        Snapshot.open(tmp_path / "a", 0)
    writer.finish(0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o600


def test_two_writers_of_one_file_make_one_snapshot(tmp_path: Path) -> None:
    first, second = SnapshotWriter(tmp_path / "a", LAYOUT), SnapshotWriter(tmp_path / "a", LAYOUT, create=False)
    first.view(LAYOUT[0])[:] = 1
    second.view(LAYOUT[1])[:] = 2
    snapshot = first.finish(0)
    assert [set(snapshot.view(spec)) for spec in LAYOUT[:2]] == [{1}, {2}]
    snapshot.verify()


def test_a_discarded_writer_leaves_nothing(tmp_path: Path) -> None:
    SnapshotWriter(tmp_path / "a", LAYOUT).discard()
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_of_the_same_name_is_refused(tmp_path: Path) -> None:
    SnapshotWriter(tmp_path / "a", LAYOUT)
    with pytest.raises(FileExistsError):
        SnapshotWriter(tmp_path / "a", LAYOUT)


def test_writing_to_a_view_of_a_snapshot_does_not_change_it(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "a")
    snapshot.view(LAYOUT[1])[:] ^= 255
    Snapshot.open(tmp_path / "a", 3).verify()


def test_a_truncated_file_is_refused_when_opened_and_later(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "a")
    os.truncate(tmp_path / "a" / WEIGHTS_FILE, 100)
    with pytest.raises(SnapshotError, match=r"must have .* bytes, has 100"):
        Snapshot.open(tmp_path / "a", 3)
    with pytest.raises(SnapshotError, match="has 100"):
        snapshot.check_size()


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with open(tmp_path / "a" / WEIGHTS_FILE, "r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        byte = file.read(1)
        file.seek(CHUNK_BYTES + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SnapshotError, match=r"chunk 1 .* does not match its digest"):
        Snapshot.open(tmp_path / "a", 3).verify()


def test_chunks_in_any_order_and_repeated_make_the_same_snapshot(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    assembly = SnapshotAssembly(tmp_path / "b", Manifest.from_bytes(source.manifest.to_bytes()))
    for index in (1, 0, 1):
        assembly.put(index, source.chunk(index).tobytes())
    copy = assembly.finish(9)
    copy.verify()
    assert (copy.version, copy.digest) == (9, source.digest)
    assert (tmp_path / "b" / WEIGHTS_FILE).read_bytes() == (tmp_path / "a" / WEIGHTS_FILE).read_bytes()


def test_a_wrong_chunk_is_refused_and_still_missing(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    assembly = SnapshotAssembly(tmp_path / "b", source.manifest)
    with pytest.raises(SnapshotError, match="does not match its digest"):
        assembly.put(0, bytes(CHUNK_BYTES))
    with pytest.raises(SnapshotError, match=f"chunk 0 has {CHUNK_BYTES} bytes, got 3"):
        assembly.put(0, b"abc")
    with pytest.raises(SnapshotError, match="chunk must be below 2, got 2"):
        assembly.put(2, b"")
    assert assembly.missing == {0, 1}
    with pytest.raises(AssertionError, match="2 chunks have not come yet"):
        assembly.finish(0)


def test_a_helper_that_fails_leaves_the_first_ones_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SnapshotWriter(tmp_path / "a", LAYOUT)
    first.view(LAYOUT[0])[:] = 1

    def fail(*_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr("protocol.snapshot_file.mmap.mmap", fail)
        with pytest.raises(SnapshotError, match=r"\d+ bytes of .*a\.part cannot be mapped: Cannot allocate memory"):
            SnapshotWriter(tmp_path / "a", LAYOUT, create=False)
    first.finish(0).verify()


def test_no_room_for_the_manifest_is_an_error_after_which_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SnapshotWriter(tmp_path / "a", LAYOUT)

    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("protocol.snapshot_file.Path.write_bytes", fail)
        with pytest.raises(SnapshotError, match=r"no room for \d+ bytes in .*a\.part: No space left on device"):
            writer.finish(0)
    writer.finish(0).verify()


def test_readers_are_let_in_while_a_process_that_is_being_started_has_a_copy_of_every_file(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "a", LAYOUT)
    copy = os.dup(writer._part._writing)  # the same open file, as behind a fork
    try:
        writer.finish(0).verify()
    finally:
        os.close(copy)


def test_no_room_is_an_error_not_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no room for"):
        SnapshotWriter(tmp_path / "a", lay_out([("huge", "float32", (1 << 50,))]))
    assert list(tmp_path.iterdir()) == []


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes), min_size=1, max_size=9))
def test_any_layout_is_aligned_without_overlap_and_survives_the_wire(
    tensors: list[tuple[str, tuple[int, ...]]],
) -> None:
    specs = lay_out((str(i), dtype, shape) for i, (dtype, shape) in enumerate(tensors))
    for before, after in itertools.pairwise(specs):
        assert before.offset + before.nbytes <= after.offset < before.offset + before.nbytes + ALIGNMENT_BYTES
        assert after.offset % ALIGNMENT_BYTES == 0
    manifest = Manifest(specs, ("0" * 64,))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "overlap": (lambda m: m["tensors"][1].__setitem__(3, 0), "without overlap or gap"),
    "outside": (lambda m: m["tensors"][2].__setitem__(3, 1 << 40), "without overlap or gap"),
    "lying length": (lambda m: m["tensors"][2].__setitem__(4, 1 << 40), "without overlap or gap"),
    "unknown dtype": (lambda m: m["tensors"][0].__setitem__(1, "object"), "must be one of"),
    "negative shape": (lambda m: m["tensors"][0].__setitem__(2, [-1, -1]), "must be whole numbers"),
    "boolean shape": (lambda m: m["tensors"][1].__setitem__(2, [True]), "must be whole numbers"),
    "short row": (lambda m: m["tensors"][0].pop(), "not a manifest"),
    "a name twice": (lambda m: m["tensors"][0].__setitem__(0, "norm"), "none twice"),
    "no tensor": (lambda m: m.__setitem__("tensors", []), "at least one tensor"),
    "tiny chunks": (lambda m: m.__setitem__("chunk_bytes", 1), "chunk_bytes must be between"),
    "missing chunk": (lambda m: m["chunks"].pop(), "do not make 1 chunks"),
    "number as digest": (lambda m: m["chunks"].__setitem__(0, 7), "64 hex digits"),
    "other format": (lambda m: m.__setitem__("format", 2), "manifest format 1 expected, got 2"),
    "no chunks": (lambda m: m.pop("chunks"), "not a manifest"),
    "more fields": (lambda m: m.__setitem__("more", 1), "canonical form"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_manifest_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    fields = json.loads(write(tmp_path / "a").manifest.to_bytes())
    breakage, message = BREAKAGES[name]
    breakage(fields)
    with pytest.raises(SnapshotError, match=message):
        Manifest.from_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b"1"])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError, match="not a manifest"):
        Manifest.from_bytes(data)
