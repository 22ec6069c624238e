"""Weights for other hosts, through real sockets and a line that breaks: what comes is right, and comes once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.snapshot_source import CHUNKS_IN_FLIGHT, SnapshotSource
from protocol.errors import SnapshotError
from protocol.snapshot_file import MANIFEST_FILE, WEIGHTS_FILE
from tests.two_hosts import CHUNK_BYTES, REPEAT_S, TwoHosts, loaded
from tests.wire import wait_until

NUM_CHUNKS = 16
EACH = set(range(NUM_CHUNKS))
WIRE = 1.01  # what headers add to the bytes of chunks, at most


def a_third_came(run: TwoHosts) -> None:
    wait_until(lambda: run.line.down.num_bytes > NUM_CHUNKS // 3 * CHUNK_BYTES, "a third came")


# --- A line that breaks


def test_a_pull_goes_on_after_cuts_in_the_middle_of_a_chunk_and_asks_for_no_verified_chunk_again() -> None:
    with TwoHosts(NUM_CHUNKS) as run:
        run.line.down.cut_at += [int(4.5 * CHUNK_BYTES), int(9.3 * CHUNK_BYTES)]
        run.pull()
        assert run.line.num_connections == 3
        assert set(run.log.asked) == EACH
        assert 2 <= run.log.num_repeated <= 2 * CHUNKS_IN_FLIGHT
        assert run.line.down.num_bytes < (NUM_CHUNKS + 2 * CHUNKS_IN_FLIGHT) * CHUNK_BYTES * WIRE


def test_a_pull_outlives_a_partition_in_which_it_asks_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.channel.RENEW_S", 1.0)
    with TwoHosts(NUM_CHUNKS) as run:

        def partition(_: SnapshotSource) -> None:
            run.line.hold()
            wait_until(lambda: run.line.num_connections == 3, "all that is missing is asked for twice more")
            run.line.release()

        run.pull(partition)
        assert set(run.log.asked) == EACH
        assert 0 < run.log.num_repeated <= 4 * CHUNKS_IN_FLIGHT


def test_a_pull_leaves_a_connection_that_went_silent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.channel.RENEW_S", 2.0)
    with TwoHosts(NUM_CHUNKS) as run:
        run.pull(lambda _: run.line.strand())
        assert run.line.num_connections >= 2
        assert set(run.log.asked) == EACH
        assert run.log.num_repeated <= 2 * CHUNKS_IN_FLIGHT


def test_a_bit_that_flips_under_way_is_refused_and_its_chunk_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encryption finds it, whichever way it went, and ends the connection."""
    monkeypatch.setattr("protocol.channel.RENEW_S", 2.0)  # the side that finds it does not connect anew by itself
    with TwoHosts(NUM_CHUNKS) as run:
        run.line.down.flip_at.append(int(3.5 * CHUNK_BYTES))

        def flip_up(_: SnapshotSource) -> None:
            wait_until(lambda: run.line.num_connections == 2, "the one with the other flip was left")
            due = run.line.down.num_bytes + CHUNK_BYTES // 2
            wait_until(lambda: run.line.down.num_bytes > due, "its handshake, with bytes that nobody reads, is over")
            run.line.up.flip_at.append(run.line.up.num_bytes + 100)

        run.pull(flip_up, after=3)
        assert run.line.num_connections >= 3
        assert (run.line.down.flip_at, run.line.up.flip_at) == ([], [])
        assert set(run.log.asked) == EACH
        assert 0 < run.log.num_repeated <= 4 * CHUNKS_IN_FLIGHT


def test_a_pull_goes_on_where_it_was_with_a_broker_that_was_restarted() -> None:
    with TwoHosts(NUM_CHUNKS) as run, run.far_generator() as far:
        a_third_came(run)
        run.line.hold()
        before, link = run.log, run.learner.link
        published, link._published = link._published, None
        run.restart_broker()
        run.line.release()
        wait_until(lambda: run.log.asked, "a chunk is asked for that the new broker does not know of")
        assert published is not None
        link._ask(published)
        wait_until(lambda: loaded(far), "it has the weights")
        assert set(before.asked) | set(run.log.asked) == EACH
        assert before.num_repeated == 0
        assert len(set(before.asked) & set(run.log.asked)) <= CHUNKS_IN_FLIGHT


@pytest.mark.parametrize(("num_chunks", "chunk_s"), [(8, 0.57 * REPEAT_S), (3, 2.0 * REPEAT_S)])
def test_a_slow_line_is_not_filled_with_answers_to_repeated_questions(num_chunks: int, chunk_s: float) -> None:
    """Those in flight together, or a single one, take longer than we wait before we look whether one was lost."""
    with TwoHosts(num_chunks) as run:
        run.line.down.bytes_per_s = CHUNK_BYTES / chunk_s
        run.pull()
        assert run.log.asked == list(range(num_chunks))
        assert run.line.down.num_bytes < num_chunks * CHUNK_BYTES * WIRE
        assert run.line.num_connections == 1


# --- Bits that flip where the files are


def flip(path: Path, place: int) -> None:
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(place % len(data))
        file.write(bytes([data[place] ^ 1]))


def test_a_bit_that_flipped_in_the_brokers_file_is_refused_by_the_name_of_its_chunk() -> None:
    with TwoHosts(NUM_CHUNKS) as run:
        weights, place = run.published / WEIGHTS_FILE, 9 * CHUNK_BYTES + 77

        async def scene() -> None:
            async with run.puller() as source:
                flip(weights, place)
                with pytest.raises(SnapshotError, match=r"chunk 9 of snapshot \w{12} does not match its digest"):
                    await source.fetch(0)
                flip(weights, place)
                run.check(await source.fetch(0))

        asyncio.run(scene())
        assert set(run.log.asked) == EACH
        assert 1 <= run.log.num_repeated <= CHUNKS_IN_FLIGHT


@pytest.mark.parametrize("place", [0, 40, -20])
def test_a_bit_that_flipped_in_the_brokers_manifest_gives_no_weights(place: int) -> None:
    with TwoHosts(NUM_CHUNKS) as run:
        flip(run.published / MANIFEST_FILE, place)

        async def scene() -> None:
            async with run.puller() as source:
                with pytest.raises(SnapshotError, match=r"chunk \d of \w{12} is not to be had: chunk: .*(mani|holds)"):
                    await source.fetch(0)

        asyncio.run(scene())
        assert run.line.down.num_bytes < CHUNK_BYTES


# --- Who gets what


def test_who_joins_late_gets_the_newest_version_alone_and_contributes() -> None:
    with TwoHosts(NUM_CHUNKS) as run:
        with run.near_generator():
            for _ in range(3):
                assert run.learner.step()
        with run.far_generator() as late:
            wait_until(lambda: loaded(late), "it has weights")
            assert (loaded(late), run.log.asked) == ([3], list(range(NUM_CHUNKS)))
            assert run.learner.step(), "of what it sent"
            wait_until(lambda: loaded(late) == [3, 4], "it follows")


@pytest.mark.parametrize(("num_steps", "then_loads"), [(2, [0, 2]), (3, [3])])
def test_who_pulls_an_older_version_finishes_it_while_it_is_of_use_and_is_then_told_to_ask_for_the_newest(
    num_steps: int, then_loads: list[int]
) -> None:
    """A version that is more than S = 2 steps behind gets no lease any more."""
    with TwoHosts(NUM_CHUNKS, staleness={"max": 2}) as run, run.far_generator() as far:
        a_third_came(run)
        run.line.hold()
        with run.near_generator():
            for _ in range(num_steps):
                assert run.learner.step()
        run.line.release()
        wait_until(lambda: num_steps in loaded(far), "it has the newest")
        assert loaded(far) == then_loads
        staging = run.folder / "staging-far"
        wait_until(lambda: not list(staging.iterdir()), "nothing of either is left on its disk")


def test_ten_hosts_at_once_get_the_weights_and_each_chunk_once() -> None:
    with TwoHosts(NUM_CHUNKS // 2) as run:
        run.line.up.delay_s = run.line.down.delay_s = 0.02

        async def pull(name: str) -> None:
            async with run.puller(name) as source:
                run.check(await source.fetch(0))

        async def scene() -> None:
            async with asyncio.timeout(60), asyncio.TaskGroup() as pulls:
                for number in range(10):
                    pulls.create_task(pull(f"far-{number}"))

        asyncio.run(scene())
        assert sorted(run.log.asked) == sorted(10 * list(range(NUM_CHUNKS // 2)))
        assert run.line.down.num_bytes < 10 * NUM_CHUNKS // 2 * CHUNK_BYTES * WIRE


# --- Adapters


def test_a_host_pulls_the_base_once_and_then_adapters_alone_also_from_a_restarted_broker() -> None:
    """With the base lost and its version asked for, the broker is told of both again before anything is served."""
    with TwoHosts(1, num_base_chunks=NUM_CHUNKS, lora={"rank": 4}) as run, run.far_generator() as far:
        wait_until(lambda: loaded(far) == [0], "it has base and adapters")
        assert sorted(run.log.asked) == sorted([*EACH, 0])
        before = run.line.down.num_bytes
        for version in (1, 2):
            assert run.learner.step()
            wait_until(lambda: loaded(far)[-1] == version, "it follows")  # noqa: B023
        assert run.line.down.num_bytes - before < 2 * 1.1 * CHUNK_BYTES
        before, num_asked = run.line.down.num_bytes, len(run.log.asked)
        assert num_asked == NUM_CHUNKS + 3
        run.restart_broker()
        assert run.learner.step()
        wait_until(lambda: loaded(far)[-1] == 3, "it follows the new one")
        assert set(run.log.asked) == {0}, "of adapters"
        assert run.line.down.num_bytes - before < 3 * CHUNK_BYTES
        with run.near_generator() as late:
            wait_until(lambda: loaded(late) == [3], "a late one of the learner's host maps both")
            assert set(run.log.asked) == {0}
