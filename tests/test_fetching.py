"""What a generator fetches from the broker: weights and the model's files, verified, and whole or not at all."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.model_files import MAX_FILE_BYTES, fetch_model_files
from actors.snapshot_source import CHUNKS_IN_FLIGHT, SnapshotSource
from protocol.errors import ProtocolError, SnapshotError
from protocol.messages import Bytes, FetchChunk, FetchFile, FetchManifest, ManifestAnswer, Message, Welcome
from protocol.weights import CHUNK_BYTES, Snapshot, SnapshotWriter, lay_out

LAYOUT = lay_out([("w", "float32", (5 * CHUNK_BYTES // 4 // 2,))])  # two and a half chunks


class Session:
    """Answers a generator's fetches by one function."""

    def __init__(self, answer: Callable[[Message], Message], files: list[tuple[str, int, str]] | None = None) -> None:
        self.welcome = Welcome(session=1, run_id="r", settings={}, heartbeat_s=1.0, files=files or [])
        self.asked: list[Message] = []
        self._answer = answer

    async def ask(self, message: Message, **how: Any) -> Message:
        self.asked.append(message)
        await asyncio.sleep(0)
        return self._answer(message)

    def chunks(self) -> list[int]:
        return sorted(message.index for message in self.asked if isinstance(message, FetchChunk))


def snapshot(folder: Path, version: int = 3, seed: int = 0) -> Snapshot:
    writer = SnapshotWriter(folder, LAYOUT)
    writer.view(LAYOUT[0])[:] = np.random.default_rng(seed).integers(0, 255, LAYOUT[0].nbytes, np.uint8)
    return writer.finish(version)


def serving(made: Snapshot, path: str = "", spoil: Callable[[int], Message | None] = lambda index: None) -> Session:
    """A broker with one snapshot; `spoil` may answer for a chunk instead."""

    def answer(message: Message) -> Message:
        if isinstance(message, FetchManifest):
            manifest = made.manifest.to_bytes()
            return ManifestAnswer(version=made.version, digest=made.digest, manifest=manifest, path=path)
        assert isinstance(message, FetchChunk)
        return spoil(message.index) or Bytes(data=made.chunk(message.index))

    return Session(answer)


def source_of(session: Session, staging: Path) -> SnapshotSource:
    staging.mkdir(exist_ok=True)
    return SnapshotSource(session, staging, 10.0)  # type: ignore[arg-type]


def fetched(session: Session, staging: Path) -> Snapshot:
    return asyncio.run(source_of(session, staging).fetch(3))


def test_on_the_same_host_the_learners_file_is_used_in_place(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    session = serving(made, path=str(made.folder))
    assert fetched(session, tmp_path / "staging").folder == made.folder
    assert session.chunks() == []


def test_elsewhere_every_chunk_is_pulled_once_and_the_copy_is_the_same(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    session = serving(made)
    copy = fetched(session, tmp_path / "staging")
    assert copy.folder.parent == tmp_path / "staging"
    assert copy.digest == made.digest
    copy.verify()
    assert session.chunks() == [0, 1, 2]


def test_a_file_of_this_host_that_we_cannot_read_is_pulled_instead(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    copy = fetched(serving(made, path="/proc/1/root/of-another-user"), tmp_path / "staging")
    assert copy.digest == made.digest


def test_another_snapshot_in_the_announced_place_is_not_taken_for_it(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    other = snapshot(tmp_path / "other", seed=1)
    copy = fetched(serving(made, path=str(other.folder)), tmp_path / "staging")
    assert copy.digest == made.digest != other.digest


def test_a_version_that_vanishes_under_the_pull_is_said_to_be_gone_and_gives_way_to_the_next(tmp_path: Path) -> None:
    gone, newest, staging = snapshot(tmp_path / "v3"), snapshot(tmp_path / "v4", seed=1), tmp_path / "staging"

    def vanish(index: int) -> None:
        if index == 1:
            raise ProtocolError("chunk", "not to be had any more")

    source = source_of(serving(gone, spoil=vanish), staging)
    with pytest.raises(SnapshotError, match=r"chunk 1 of \w{12} is not to be had"):
        asyncio.run(source.fetch(3))
    source._session = serving(newest)  # type: ignore[assignment]
    copy = asyncio.run(source.fetch(4))
    assert list(staging.iterdir()) == [copy.folder], "the half of the other is gone"
    assert copy.digest == newest.digest


def test_a_chunk_that_is_not_what_the_manifest_says_is_refused_and_those_before_it_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.snapshot_source.CHUNKS_IN_FLIGHT", 1)
    made, staging = snapshot(tmp_path / "v3"), tmp_path / "staging"
    lies = [Bytes(data=made.chunk(0))]
    session = serving(made, spoil=lambda index: lies.pop() if index == 1 and lies else None)
    source = source_of(session, staging)
    with pytest.raises(SnapshotError, match=r"chunk 1 of snapshot .* does not match its digest"):
        asyncio.run(source.fetch(3))
    copy = asyncio.run(source.fetch(3))
    copy.verify()
    assert copy.digest == made.digest
    assert session.chunks() == [0, 1, 1, 2]


def test_a_manifest_of_other_weights_than_announced_is_refused(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    lie = ManifestAnswer(version=3, digest="0" * 64, manifest=made.manifest.to_bytes(), path="")
    with pytest.raises(SnapshotError, match="the manifest of version 3 does not match its digest 000000000000"):
        fetched(Session(lambda message: lie), tmp_path / "staging")


def test_a_version_that_nobody_has_any_more_is_said_to_be_gone(tmp_path: Path) -> None:
    def gone(message: Message) -> Message:
        raise ProtocolError("version", "version 3 is not on the shelf any more; ask for the newest")

    with pytest.raises(SnapshotError, match="version 3 is not to be had: version: version 3 is not on the shelf"):
        fetched(Session(gone), tmp_path / "staging")


def test_only_pulled_snapshots_are_freed_after_use(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "v3")
    source = source_of(serving(made), tmp_path / "staging")
    pulled = asyncio.run(source.fetch(3))
    asyncio.run(source.discard(made))
    asyncio.run(source.discard(pulled))
    assert made.folder.exists()
    assert not pulled.folder.exists()


def test_what_was_pulled_and_not_used_is_kept_until_other_weights_are_pulled(tmp_path: Path) -> None:
    made, newest, staging = snapshot(tmp_path / "v3"), snapshot(tmp_path / "v4", seed=1), tmp_path / "staging"
    session = serving(made)
    source = source_of(session, staging)
    asyncio.run(source.fetch(3))
    again = asyncio.run(source.fetch(3))
    again.verify()
    assert (again.digest, session.chunks()) == (made.digest, [0, 1, 2])
    source._session = serving(newest)  # type: ignore[assignment]
    copy = asyncio.run(source.fetch(4))
    assert list(staging.iterdir()) == [copy.folder]
    assert copy.digest == newest.digest


def test_a_pull_that_finds_no_room_for_its_manifest_asks_for_no_chunk_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = snapshot(tmp_path / "v3")
    session = serving(made)
    source = source_of(session, tmp_path / "staging")

    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("protocol.snapshot_file.Path.write_bytes", fail)
        with pytest.raises(SnapshotError, match="No space left on device"):
            asyncio.run(source.fetch(3))
    asyncio.run(source.fetch(3)).verify()
    assert session.chunks() == [0, 1, 2]


def test_gigabytes_are_made_and_removed_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = snapshot(tmp_path / "v3"), snapshot(tmp_path / "v4", seed=1)
    source = source_of(serving(first, spoil=lambda index: Bytes(data=np.zeros(1, np.uint8))), tmp_path / "staging")
    threads: list[threading.Thread] = []

    def noting(work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*given, **named)

        return noted

    monkeypatch.setattr("protocol.snapshot_file.os.posix_fallocate", noting(os.posix_fallocate))
    monkeypatch.setattr("protocol.snapshot_file.shutil.rmtree", noting(shutil.rmtree))
    with pytest.raises(SnapshotError):
        asyncio.run(source.fetch(3))
    source._session = serving(second)  # type: ignore[assignment]
    asyncio.run(source.discard(asyncio.run(source.fetch(4))))
    assert len(threads) == 4, "made twice and removed twice"
    assert threading.main_thread() not in threads


def test_more_chunks_are_asked_for_at_once_as_long_as_they_come_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.weights.CHUNK_BYTES", 1 << 20)
    made, num_in_flight = snapshot(tmp_path / "v3"), list[int]()

    def slower(index: int) -> None:
        num_in_flight.append(source._num_in_flight)
        if index == 6:
            monkeypatch.setattr("actors.snapshot_source.SLOW_S", 0.0)

    source = source_of(serving(made, spoil=slower), tmp_path / "staging")
    asyncio.run(source.fetch(3)).verify()
    assert (len(num_in_flight), num_in_flight[0], max(num_in_flight)) == (10, 1, CHUNKS_IN_FLIGHT)
    assert source._num_in_flight == 1


# --- Bases of adapters


def with_base(folder: Path, base: Snapshot, version: int) -> Snapshot:
    """Adapters of one chunk."""
    layout = lay_out([("a", "float32", (1000,))])
    writer = SnapshotWriter(folder, layout)
    writer.view(layout[0])[:] = version
    return writer.finish(version, base)


def serving_all(versions: list[Snapshot], base: Snapshot, path: bool = False) -> Session:
    def answer(message: Message) -> Message:
        if isinstance(message, FetchManifest):
            found = base if message.base else next(made for made in versions if made.version == message.version)
            where = str(found.folder) if path else ""
            manifest = found.manifest.to_bytes()
            return ManifestAnswer(version=found.version, digest=found.digest, manifest=manifest, path=where)
        assert isinstance(message, FetchChunk)
        return Bytes(
            data=next(made for made in [base, *versions] if made.digest == message.digest).chunk(message.index)
        )

    return Session(answer)


def pulled(session: Session) -> list[str]:
    return [message.digest for message in session.asked if isinstance(message, FetchChunk)]


def test_a_late_generator_pulls_the_base_once_and_then_adapters_alone(tmp_path: Path) -> None:
    base, staging = snapshot(tmp_path / "base", 0), tmp_path / "staging"
    made = [with_base(tmp_path / f"v{version}", base, version) for version in (3, 4, 5)]
    session, num_bytes = serving_all(made, base), []
    source, held = source_of(session, staging), ""
    for entry in made:
        copy = asyncio.run(source.fetch(entry.version, held))
        copy.verify()
        assert (copy.base is None) == bool(held)
        if copy.base is not None:
            copy.base.verify()
            held = copy.base.digest
        num_bytes.append(sum(len(session._answer(m).data) for m in session.asked if isinstance(m, FetchChunk)))  # type: ignore[attr-defined]
        asyncio.run(source.discard(copy))
        assert list(staging.iterdir()) == []
    assert pulled(session) == [base.digest] * 3 + [entry.digest for entry in made]
    assert num_bytes == [LAYOUT[0].nbytes + 4000 * number for number in (1, 2, 3)]


def test_a_base_outlives_the_version_that_vanished_while_it_was_pulled(tmp_path: Path) -> None:
    base = snapshot(tmp_path / "base", 0)
    gone, newest = (with_base(tmp_path / f"v{version}", base, version) for version in (3, 4))
    session = serving_all([gone, newest], base)
    answer = session._answer

    def without_gone(message: Message) -> Message:
        if isinstance(message, FetchChunk) and message.digest == gone.digest:
            raise ProtocolError("chunk", "not to be had any more")
        return answer(message)

    session._answer = without_gone
    source = source_of(session, tmp_path / "staging")
    with pytest.raises(SnapshotError, match="is not to be had"):
        asyncio.run(source.fetch(3))
    copy = asyncio.run(source.fetch(4))
    assert copy.base is not None
    assert pulled(session) == [base.digest] * 3 + [gone.digest, newest.digest]


def test_on_the_same_host_the_base_is_used_in_place_too(tmp_path: Path) -> None:
    base = snapshot(tmp_path / "base", 0)
    session = serving_all([with_base(tmp_path / "v3", base, 3)], base, path=True)
    copy = fetched(session, tmp_path / "staging")
    assert copy.base is not None
    assert (copy.base.folder, pulled(session)) == (base.folder, [])


def test_a_base_that_names_a_base_or_is_another_is_refused(tmp_path: Path) -> None:
    base, other = snapshot(tmp_path / "base", 0), snapshot(tmp_path / "other", 0, seed=1)
    below = with_base(tmp_path / "below", base, 0)
    for sent, named in ((other, base), (below, below)):
        session = serving_all([with_base(tmp_path / f"v3-{sent.digest[:4]}", named, 3)], sent)
        with pytest.raises(SnapshotError, match=f"version 3 stands beside {named.digest[:12]}, which is not what was"):
            fetched(session, tmp_path / "staging")
        assert pulled(session) == []


# --- The model's files

CONTENT = {"config.json": b'{"vocab_size": 7}', "tokenizer.json": bytes(range(256)) * 40}
PART = 1000


def entries(**other: tuple[int, str]) -> list[tuple[str, int, str]]:
    given = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}
    return [(name, size, digest) for name, (size, digest) in (given | other).items()]


def part(message: Message) -> Message:
    assert isinstance(message, FetchFile)
    content = CONTENT.get(message.name, b"")[message.offset : message.offset + PART]
    return Bytes(data=np.frombuffer(content, np.uint8))


def files(folder: Path, files: list[tuple[str, int, str]]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return asyncio.run(fetch_model_files(Session(part, files), folder))  # type: ignore[arg-type]


def test_the_models_files_arrive_in_parts_and_whole(tmp_path: Path) -> None:
    folder = files(tmp_path / "model", entries())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "sub/evil.json", "", ".", ".."])
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProtocolError, match="refusing a model file called"):
        files(tmp_path / "model", [(name, 3, "")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_too_large_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=f"of {MAX_FILE_BYTES + 1} bytes"):
        files(tmp_path / "model", [("config.json", MAX_FILE_BYTES + 1, "")])


def test_a_file_that_ends_early_or_is_another_is_refused(tmp_path: Path) -> None:
    size, digest = len(CONTENT["config.json"]), "0" * 64
    with pytest.raises(ProtocolError, match=r"model file config\.json ended after 17 of 99 bytes"):
        files(tmp_path / "model", [("config.json", 99, digest)])
    with pytest.raises(ProtocolError, match=r"model file config\.json does not match its digest"):
        files(tmp_path / "model", [("config.json", size, digest)])
