"""The snapshots that stand in shared memory: how many, for how long, and that none changes under a reader."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from bench import publish as bench_publish
from launch.restarts import HOPELESS
from learner.snapshot_ring import SnapshotRing
from protocol.errors import PeerTimeout, SnapshotError
from protocol.snapshot_file import WEIGHTS_FILE
from protocol.weights import CHUNK_BYTES, Snapshot, lay_out

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = lay_out([("w", "float32", ((CHUNK_BYTES + 4096) // 4,))])
READER = """import sys
from pathlib import Path
from protocol.weights import Snapshot
snapshot = Snapshot.open(Path(sys.argv[1]), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


def raise_full(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def publish(ring: SnapshotRing, version: int) -> Path:
    """A snapshot full of its version's number, that nobody reads."""
    writer = ring.begin(version)
    writer.view(LAYOUT[0])[:] = version
    return writer.finish(version).folder


def standing(folder: Path) -> dict[str, int]:
    """Folder -> the inode of its flat file."""
    return {place.name: (place / WEIGHTS_FILE).stat().st_ino for place in sorted(folder.iterdir())}


def test_two_files_take_turns_when_nobody_reads(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    inodes = []
    for version in range(6):
        folder = publish(ring, version)
        found = standing(tmp_path / "snapshots")
        assert list(found) == [f"v{n}" for n in range(max(0, version - 1), version + 1)]
        Snapshot.open(folder, version).verify()
        inodes.append(found[folder.name])
    assert inodes == inodes[:2] * 3


def test_a_snapshot_stands_unchanged_as_long_as_somebody_reads_it_and_is_then_written_over(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    publish(ring, 0)
    reader = Snapshot.open(publish(ring, 1), 1)
    publish(ring, 2)
    for version in range(3, 6):
        publish(ring, version)
        assert list(standing(tmp_path / "snapshots")) == ["v1", f"v{version - 1}", f"v{version}"]
        reader.verify()
        Snapshot.open(reader.folder, 1)  # by its name, as an engine's own process does
    view = reader.view(LAYOUT[0])[:1]
    del reader
    publish(ring, 6)
    assert list(standing(tmp_path / "snapshots")) == ["v1", "v5", "v6"], "a view of it is left"
    assert view.tolist() == [1]
    del view
    publish(ring, 7)
    assert list(standing(tmp_path / "snapshots")) == ["v6", "v7"]


def test_the_newest_is_never_written_over(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    folders = [publish(ring, version) for version in range(2)]
    writer = ring.begin(2)
    writer.view(LAYOUT[0])[:] = 2
    Snapshot.open(folders[1], 1).verify()
    with pytest.raises(SnapshotError, match=r"no snapshot at .*v0: No such file or directory"):
        Snapshot.open(folders[0], 0)


def test_a_reader_that_comes_while_its_file_is_written_over_is_refused(tmp_path: Path) -> None:
    """It found the folder under its old name, and looks into it when it has the next one's."""
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    folder = publish(ring, 0)
    publish(ring, 1)
    writer = ring.begin(2)
    aside = folder.with_name("v2.part")
    assert aside.exists()
    with pytest.raises(SnapshotError, match=r"no snapshot at .*: its file is being written over with a later one"):
        Snapshot.open(aside, 0)
    writer.finish(2)


def test_a_reader_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    folder = publish(ring, 0)
    command = [sys.executable, "-c", READER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        for version in (1, 2):
            publish(ring, version)
        assert list(standing(tmp_path / "snapshots")) == ["v0", "v1", "v2"]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    publish(ring, 3)
    assert list(standing(tmp_path / "snapshots")) == ["v2", "v3"]


def test_a_spare_file_is_freed_when_many_readers_have_gone(tmp_path: Path) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    readers = [Snapshot.open(publish(ring, version), version) for version in range(4)]
    assert len(standing(tmp_path / "snapshots")) == 4
    for reader in readers:
        assert np.unique(reader.view(LAYOUT[0])).tolist() == [reader.version]
    del readers, reader
    publish(ring, 4)
    assert list(standing(tmp_path / "snapshots")) == ["v3", "v4"]


def test_when_memory_is_full_the_learner_waits_for_a_reader_to_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    readers = [Snapshot.open(publish(ring, version), version) for version in range(3)]
    looks = Queue[None]()

    def full(*_: int) -> None:
        looks.put(None)
        raise_full()

    monkeypatch.setattr("protocol.snapshot_file.os.posix_fallocate", full)
    with ThreadPoolExecutor(1) as learner:
        published = learner.submit(publish, ring, 3)
        for _ in range(3):
            looks.get(timeout=20)
        del readers[0]
        assert published.result(20).name == "v3"
    assert list(standing(tmp_path / "snapshots")) == ["v1", "v2", "v3"]


def test_when_memory_stays_full_the_learner_says_who_is_read_and_a_restart_may_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    readers = [Snapshot.open(publish(ring, version), version) for version in range(3)]
    monkeypatch.setattr("learner.snapshot_ring.ROOM_S", 0.1)
    monkeypatch.setattr("protocol.snapshot_file.os.posix_fallocate", raise_full)
    words = r"waited 0 s for room for snapshot v3 in .*: the broker or a generator of this host still reads v0, v1$"
    with pytest.raises(PeerTimeout, match=words) as caught:
        ring.begin(3)
    assert caught.value.exit_code not in HOPELESS
    for reader in readers:
        reader.verify()


def test_when_memory_is_full_and_nobody_reads_the_learner_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = SnapshotRing(tmp_path / "snapshots", LAYOUT)
    monkeypatch.setattr("protocol.snapshot_file.os.posix_fallocate", raise_full)
    with pytest.raises(SnapshotError, match=r"no room for \d+ bytes in .*v0\.part: No space left on device"):
        ring.begin(0)
    assert standing(tmp_path / "snapshots") == {}


def test_what_cannot_fit_is_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocating in vain would take, for a moment and again and again, all the memory that others could have."""
    ring = SnapshotRing(tmp_path / "snapshots", lay_out([("w", "float32", (1 << 50,))]))
    allocated: list[int] = []
    monkeypatch.setattr("protocol.snapshot_file.os.posix_fallocate", lambda *how: allocated.append(how[-1]))
    with pytest.raises(SnapshotError, match=rf"no room for {1 << 52} bytes in .*snapshots: \d+ are free"):
        ring.begin(0)
    assert allocated == []


def test_what_an_earlier_run_left_is_removed_and_only_this_user_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    (folder / "v77").mkdir(parents=True)
    SnapshotRing(folder, LAYOUT)
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_benchmark_of_publishing_says_what_each_way_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_publish.main(["--megabytes", "1", "--turns", "1"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {"fresh_s", "over_s", "memcpy_s", "fresh_per_memcpy", "over_per_memcpy"} < line.keys()
