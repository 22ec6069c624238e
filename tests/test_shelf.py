"""The broker's shelf of snapshots: which versions can be had, under which digest, and for how long."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.shelf import KEPT, REMEMBERED, Shelf
from protocol.errors import SnapshotError
from protocol.messages import Publish
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.weights import CHUNK_BYTES, Snapshot, SnapshotWriter, lay_out
from tests.locks import is_held

LAYOUT = lay_out([("w", "float32", ((CHUNK_BYTES + 4096) // 4,))])  # two chunks


def snapshot(
    folder: Path, version: int, seed: int | None = None, base: Snapshot | None = None, name: str = ""
) -> Snapshot:
    writer = SnapshotWriter(folder / (name or f"v{version}"), LAYOUT)
    rng = np.random.default_rng(version if seed is None else seed)
    writer.view(LAYOUT[0])[:] = rng.integers(0, 255, LAYOUT[0].nbytes, np.uint8)
    return replace(writer.finish(version, base), data=np.empty(0, np.uint8))  # the learner does not read it


def publish(made: Snapshot, **fields: Any) -> Publish:
    given = {
        "version": made.version,
        "digest": made.digest,
        "manifest": made.manifest.to_bytes(),
        "path": str(made.folder),
        "host": "here",
    }
    return Publish(**given | fields)


READER, OTHER = 1, 2  # sessions


def pull(shelf: Shelf, made: Snapshot, reader: int = READER, index: int = 0, now: float = 0.0) -> None:
    """One chunk of a pull, which is what the learner wrote."""
    made.manifest.check_chunk(index, shelf.chunk(made.digest, index, reader, now))


def refusal(shelf: Shelf, made: Snapshot, reader: int = READER) -> str:
    with pytest.raises(SnapshotError) as caught:
        shelf.chunk(made.digest, 0, reader, 0.0)
    return str(caught.value)


def test_what_is_put_can_be_had_by_version_and_chunk_by_chunk(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    entry = shelf.version(4)
    assert entry is not None
    assert (entry.digest, entry.path, entry.host) == (made.digest, str(made.folder), "here")
    for index in range(2):
        pull(shelf, made, index=index)


def test_a_manifest_that_is_none_or_another_is_refused_and_nothing_kept(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    with pytest.raises(SnapshotError, match="not a manifest"):
        shelf.put(publish(made, manifest=b"{}"))
    with pytest.raises(ValueError, match=f"digest is {made.digest[:12]}, the message says 000000000000"):
        shelf.put(publish(made, digest="0" * 64))
    assert shelf.version(4) is None
    assert shelf.digest(4) == ""


def test_the_newest_and_the_one_before_it_can_be_had_and_what_came_before_cannot(tmp_path: Path) -> None:
    shelf, made = Shelf(), [snapshot(tmp_path, version) for version in range(KEPT + 1)]
    for entry in made:
        shelf.put(publish(entry))
    assert [shelf.version(version) is not None for version in range(KEPT + 1)] == [False] + [True] * KEPT
    assert refusal(shelf, made[0]) == "it is not on the shelf"
    pull(shelf, made[1])


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
    pull(shelf, made)
    shutil.rmtree(made.folder)
    pull(shelf, made, index=1)


def test_a_snapshot_that_vanished_before_it_was_pulled_is_an_error(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shutil.rmtree(made.folder)
    assert refusal(shelf, made).startswith("no snapshot at")


def test_another_snapshot_in_the_same_folder_is_not_served_under_the_old_digest(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    shutil.rmtree(made.folder)
    other = snapshot(tmp_path, 4, seed=99)
    assert refusal(shelf, made) == f"its folder holds {other.digest[:12]} now"


def test_equal_weights_of_two_versions_are_served_from_the_newer_folder(tmp_path: Path) -> None:
    """A skipped step yields a version with the same bytes; the older folder may be gone."""
    old, new, shelf = snapshot(tmp_path, 4, seed=1), snapshot(tmp_path, 5, seed=1), Shelf()
    assert old.digest == new.digest
    shelf.put(publish(old))
    shelf.put(publish(new))
    shutil.rmtree(old.folder)
    pull(shelf, new)


def test_a_chunk_beyond_the_last_is_an_error(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    with pytest.raises(SnapshotError, match="chunk must be below 2, got 2"):
        shelf.chunk(made.digest, 2, READER, 0.0)
    assert not is_held(made.folder)


def test_a_new_epoch_begins_with_an_empty_shelf(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    pull(shelf, made)
    shelf.clear()
    assert (shelf.version(4), shelf.digest(4), is_held(made.folder)) == (None, "", False)
    assert refusal(shelf, made) == "it is not on the shelf"


# --- How long a file is held


def test_a_file_is_held_exactly_as_long_as_somebody_pulls_it(tmp_path: Path) -> None:
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    assert not is_held(made.folder)
    pull(shelf, made, READER)
    pull(shelf, made, OTHER)
    shelf.ended(READER)
    assert is_held(made.folder), "the other still pulls it"
    shelf.ended(OTHER, "another digest")
    assert is_held(made.folder), "what the other holds is not what it pulls"
    shelf.ended(OTHER, made.digest)
    assert not is_held(made.folder)


def test_a_chunk_that_is_still_to_be_sent_holds_nothing(tmp_path: Path) -> None:
    """It may wait in a socket's queue for as long as its reader is slow, and must not change meanwhile."""
    made, shelf = snapshot(tmp_path, 4), Shelf()
    shelf.put(publish(made))
    queued = shelf.chunk(made.digest, 0, READER, 0.0)
    shelf.ended(READER)
    assert not is_held(made.folder)
    (made.folder / WEIGHTS_FILE).write_bytes(bytes(made.manifest.total_bytes))
    made.manifest.check_chunk(0, queued)


def test_who_asks_for_nothing_for_too_long_holds_nothing_and_who_is_slow_does(tmp_path: Path) -> None:
    old, new, shelf = snapshot(tmp_path, 4), snapshot(tmp_path, 5), Shelf()
    shelf.put(publish(old))
    pull(shelf, old, READER, now=0.0)
    shelf.put(publish(new))
    for now in (2.9, 5.8, 8.7):
        shelf.expire(now, limit_s=3.0)
        pull(shelf, old, READER, now=now)
    shelf.expire(11.8, limit_s=3.0)
    assert not is_held(old.folder)


def test_an_older_version_can_be_finished_by_who_began_in_time(tmp_path: Path) -> None:
    shelf, made = Shelf(), [snapshot(tmp_path, version) for version in range(6)]
    shelf.put(publish(made[0]))
    pull(shelf, made[0])
    for entry in made[1:]:
        shelf.put(publish(entry))
        pull(shelf, made[0], index=1)
    shelf.ended(READER)
    assert refusal(shelf, made[0]) == "it is not on the shelf"


def test_of_several_older_versions_the_oldest_is_finished_and_the_others_readers_go_to_the_newest(
    tmp_path: Path,
) -> None:
    shelf, made = Shelf(), [snapshot(tmp_path, version) for version in range(3)]
    shelf.put(publish(made[0]))
    pull(shelf, made[0], READER)
    shelf.put(publish(made[1]))
    pull(shelf, made[1], OTHER)
    shelf.put(publish(made[2]))
    assert [is_held(entry.folder) for entry in made] == [True, False, False]
    assert refusal(shelf, made[1], OTHER) == "an older one is being finished"
    pull(shelf, made[2], OTHER)
    pull(shelf, made[0], READER)
    assert [is_held(entry.folder) for entry in made] == [True, False, True]


def test_a_version_that_no_lease_is_given_for_any_more_is_not_finished(tmp_path: Path) -> None:
    shelf, made = Shelf(), [snapshot(tmp_path, version) for version in range(4)]
    for entry in made:
        shelf.put(publish(entry), oldest_useful=entry.version - 2)
        if entry.version < 3:
            pull(shelf, made[0])
    assert refusal(shelf, made[0]) == "it is not on the shelf"
    assert not is_held(made[0].folder)


def test_the_file_of_equal_weights_that_are_published_again_is_let_go(tmp_path: Path) -> None:
    old, new, shelf = snapshot(tmp_path, 4, seed=1), snapshot(tmp_path, 5, seed=1), Shelf()
    shelf.put(publish(old))
    pull(shelf, old)
    shelf.put(publish(new))
    pull(shelf, new, index=1)
    assert [is_held(old.folder), is_held(new.folder)] == [False, True]


# --- Bases of adapters


def test_a_base_can_be_pulled_as_long_as_a_version_names_it_and_holds_up_nobody(tmp_path: Path) -> None:
    base, shelf = snapshot(tmp_path, 0, seed=50, name="base"), Shelf()
    made = [snapshot(tmp_path, version, base=base) for version in range(5)]
    shelf.put_base(publish(base, is_base=True))
    for entry in made[:4]:
        shelf.put(publish(entry), oldest_useful=entry.version - 1)
        pull(shelf, base, READER, index=entry.version % 2)
    assert is_held(base.folder), "although nothing is useful of the version that it was first pulled for"
    pull(shelf, made[2], OTHER)  # the base that is being pulled is no older version
    shelf.put(publish(snapshot(tmp_path, 6)))
    pull(shelf, base, READER)
    shelf.put(publish(snapshot(tmp_path, 7)))
    assert shelf.base(base.digest) is None
    shelf.ended(READER)
    assert not is_held(base.folder)
    assert refusal(shelf, base) == "it is not on the shelf"


def test_of_bases_that_no_version_names_the_last_stands(tmp_path: Path) -> None:
    """Else whoever publishes bases without end would fill the broker."""
    named, shelf = snapshot(tmp_path, 0, seed=50, name="named"), Shelf()
    shelf.put_base(publish(named, is_base=True))
    shelf.put(publish(snapshot(tmp_path, 1, base=named)))
    others = [snapshot(tmp_path, 0, seed=51 + number, name=f"other-{number}") for number in range(3)]
    for other in others:
        shelf.put_base(publish(other, is_base=True))
    standing = [shelf.base(base.digest) is not None for base in (named, *others)]
    assert standing == [True, False, False, True]


def test_a_version_whose_base_is_not_here_is_refused_and_so_is_a_base_of_a_base(tmp_path: Path) -> None:
    base = snapshot(tmp_path, 0, seed=50, name="base")
    adapters, shelf = snapshot(tmp_path, 1, base=base), Shelf()
    with pytest.raises(LookupError, match=f"version 1 stands beside {base.digest[:12]}, which is not published"):
        shelf.put(publish(adapters))
    assert shelf.version(1) is None
    with pytest.raises(ValueError, match=f"a base has no base, {adapters.digest[:12]} names {base.digest[:12]}"):
        shelf.put_base(publish(adapters, is_base=True))
    shelf.put_base(publish(base, is_base=True))
    shelf.put(publish(adapters))
    shelf.clear()
    assert shelf.base(base.digest) is None
