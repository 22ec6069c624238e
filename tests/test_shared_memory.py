"""Folders in shared memory: private, and never left behind for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol import shared_memory
from protocol.errors import PreflightError
from protocol.shared_memory import folder_of, private_folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm/tether-UID, which other runs of this machine use."""
    place = tmp_path / "tether"
    monkeypatch.setattr(shared_memory, "_base", lambda: place)
    return place


def dead_pid() -> int:
    """Of a process that has ended and was waited for."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    return ended.pid


def test_a_folder_belongs_to_its_user_alone(base: Path) -> None:
    folder = private_folder("learner")
    assert folder == base / f"learner-{os.getpid()}"
    assert [path.stat().st_mode & 0o777 for path in (base, folder)] == [0o700, 0o700]


def test_a_wide_umask_opens_nothing(base: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder("learner")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (base, folder)] == [0o700, 0o700]


def test_what_a_killed_process_left_is_removed_by_the_next_one(base: Path) -> None:
    stale = base / f"generator-my-host-{dead_pid()}"
    stale.mkdir(mode=0o700, parents=True)
    base.chmod(0o700)
    (stale / "weights.bin").write_bytes(b"0" * 4096)
    private_folder("learner")
    assert not stale.exists()


def test_the_folder_of_a_living_process_stays(base: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        theirs = base / f"learner-{living.pid}"
        theirs.mkdir(parents=True)
        base.chmod(0o700)
        private_folder("learner")
        assert theirs.exists()
    finally:
        living.communicate(b"\n", timeout=30)


def test_a_second_call_starts_with_an_empty_folder(base: Path) -> None:
    (private_folder("learner") / "old").write_text("old")
    assert list(private_folder("learner").iterdir()) == []


def test_ranks_find_the_folder_of_the_first(base: Path) -> None:
    assert folder_of("learner", os.getpid()) == private_folder("learner")


def refused(base: Path) -> bool:
    with pytest.raises(PreflightError, match=f"{base} must be a folder of user {os.getuid()} with mode 700; remove"):
        private_folder("learner")
    return True


def test_a_folder_that_others_can_read_is_refused(base: Path) -> None:
    base.mkdir(mode=0o755)
    assert refused(base)
    assert list(base.iterdir()) == []


def test_a_link_in_its_place_is_refused_and_not_followed(base: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / f"precious-{dead_pid()}").mkdir()
    base.symlink_to(elsewhere)
    assert refused(base)
    assert len(list(elsewhere.iterdir())) == 1


def test_a_dangling_link_and_a_plain_file_in_its_place_are_refused(base: Path, tmp_path: Path) -> None:
    base.symlink_to(tmp_path / "nowhere")
    assert refused(base)
    base.unlink()
    base.write_text("")
    base.chmod(0o600)
    assert refused(base)


def test_a_folder_of_another_user_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder("learner")
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    assert refused(base)
