"""The broker's shelf of snapshots: which versions can be had, under which digest, and for how long."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.shelf import KEPT, REMEMBERED, Shelf
from protocol.messages import Publish
from protocol.weights import CHUNK_BYTES, Snapshot, SnapshotError, SnapshotWriter, lay_out

LAYOUT = lay_out([("w", "float32", ((CHUNK_BYTES + 4096) // 4,))])  # two chunks


def snapshot(folder: Path, version: int, seed: int | None = None) -> Snapshot:
    writer = SnapshotWriter(folder / f"v{version}", LAYOUT)
    rng = np.random.default_rng(version if seed is None else seed)
    writer.view(LAYOUT[0])[:] = rng.integers(0, 255, LAYOUT[0].nbytes, np.uint8)
    return writer.finish(version)


def publish(made: Snapshot, **fields: Any) -> Publish:
    given = {
        "version": made.version,
        "digest": made.digest,
        "manifest": made.manifest.to_bytes(),
        "path": str(made.folder),
        "host": "here",
    }
    return Publish(**given | fields)


def test_what_is_put_can_be_had_by_version_and_chunk_by_chunk(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    entry = shelf.version(4)
    assert entry is not None
    assert (entry.digest, entry.path, entry.host) == (made.digest, str(made.folder), "here")
    for index in range(2):
        made.manifest.check_chunk(index, shelf.chunk(made.digest, index))


def test_a_manifest_that_is_none_or_another_is_refused_and_nothing_kept(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    with pytest.raises(SnapshotError, match="not a manifest"):
        shelf.put(publish(made, manifest=b"{}"))
    with pytest.raises(ValueError, match=f"digest is {made.digest[:12]}, the message says 000000000000"):
        shelf.put(publish(made, digest="0" * 64))
    assert shelf.version(4) is None
    assert shelf.digest(4) == ""


def test_the_newest_versions_stay_and_older_ones_leave_with_their_chunks(tmp_path: Path) -> None:
    shelf, made = Shelf(), [snapshot(tmp_path, version) for version in range(KEPT + 1)]
    for entry in made:
        shelf.put(publish(entry))
        shelf.chunk(entry.digest, 0)
    assert shelf.version(0) is None
    assert [shelf.version(version) is not None for version in range(1, KEPT + 1)] == [True] * KEPT
    with pytest.raises(SnapshotError, match="not on the shelf"):
        shelf.chunk(made[0].digest, 0)
    shelf.chunk(made[1].digest, 0)


def test_a_digest_is_known_longer_than_its_snapshot_is_kept(tmp_path: Path) -> None:
    """A generator that evaluates holds a version while the learner goes on."""
    shelf, made = Shelf(), snapshot(tmp_path, 0)
    for version in range(REMEMBERED + 1):
        shelf.put(publish(made, version=version))
    assert shelf.digest(0) == ""
    assert shelf.digest(1) == made.digest
    assert shelf.version(1) is None


def test_publishing_twice_is_publishing_once(tmp_path: Path) -> None:
    shelf = Shelf()
    for entry in [snapshot(tmp_path, version) for version in range(KEPT)] * 2:
        shelf.put(publish(entry))
    assert all(shelf.version(version) is not None for version in range(KEPT))


def test_a_snapshot_that_is_being_pulled_outlives_its_folder(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shelf.chunk(made.digest, 0)
    shutil.rmtree(made.folder)
    made.manifest.check_chunk(1, shelf.chunk(made.digest, 1))


def test_a_snapshot_that_vanished_before_it_was_pulled_is_an_error(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shutil.rmtree(made.folder)
    with pytest.raises(SnapshotError, match="no snapshot at"):
        shelf.chunk(made.digest, 0)


def test_another_snapshot_in_the_same_folder_is_not_served_under_the_old_digest(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shutil.rmtree(made.folder)
    other = snapshot(tmp_path, 4, seed=99)
    with pytest.raises(SnapshotError, match=f"its folder holds {other.digest[:12]} now"):
        shelf.chunk(made.digest, 0)


def test_equal_weights_of_two_versions_are_served_from_the_newer_folder(tmp_path: Path) -> None:
    """A skipped step yields a version with the same bytes; the older folder may be gone."""
    old, new, shelf = snapshot(tmp_path, 4, seed=1), snapshot(tmp_path, 5, seed=1), Shelf()
    assert old.digest == new.digest
    shelf.put(publish(old))
    shelf.put(publish(new))
    shutil.rmtree(old.folder)
    new.manifest.check_chunk(0, shelf.chunk(new.digest, 0))


def test_a_chunk_beyond_the_last_is_an_error(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    with pytest.raises(SnapshotError, match="chunk must be below 2, got 2"):
        shelf.chunk(made.digest, 2)


def test_a_new_epoch_begins_with_an_empty_shelf(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shelf.chunk(made.digest, 0)
    shelf.clear()
    assert (shelf.version(4), shelf.digest(4)) == (None, "")
    with pytest.raises(SnapshotError, match="not on the shelf"):
        shelf.chunk(made.digest, 0)
