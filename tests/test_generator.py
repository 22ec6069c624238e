"""The generator's loop around a fake engine, with a scripted broker at the other end of its session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engine import EngineDead, EngineOptions, HeldVersion
from actors.fake_engine import FakeEngine
from actors.generator import Generator
from actors.rollout import Episode
from actors.rollouts.runner import RolloutRunner
from actors.scorer import Score
from protocol.config import Config
from protocol.errors import SnapshotError
from protocol.messages import (
    Beat,
    BeatAnswer,
    Done,
    LeaseItem,
    Leases,
    Message,
    Pull,
    Release,
    Result,
    Verdict,
    VersionHint,
    Wait,
    Welcome,
)
from protocol.types import Completion, Prompt
from protocol.weights import Snapshot, SnapshotWriter, lay_out
from tests.engines import until
from tests.small_run import make_model_files

CONFIG = Config.model_validate(
    {
        "batch": {"prompts": 4, "group_size": 2},
        "sampling": {"max_tokens": 30},
        "generators": {"max_running": 8},
        "watchdog": {"heartbeat_s": 0.02},
    }
)


class Session:
    """What a generator needs of a session. Leases are put into `leases`; a pull waits for the next."""

    def __init__(self) -> None:
        self.epoch = 1
        self.welcome = Welcome(session=1, run_id="r", settings={}, heartbeat_s=0.02)
        self.on_hint: Any = None
        self.on_epoch: Any = None
        self.newest = (0, "")
        self.revoked: list[tuple[int, int]] = []
        self.leases: asyncio.Queue[Leases] = asyncio.Queue()
        self.pulls: list[Pull] = []
        self.beats: list[Beat] = []
        self.results: list[Result] = []
        self.released: list[Release] = []
        self.verdicts = asyncio.Event()  # cleared: they are withheld
        self.verdicts.set()

    async def ask(self, message: Message, *, timeout_s: float = 60.0, bulk: bool = False, what: str = "") -> Message:
        match message:
            case Pull():
                self.pulls.append(message)
                try:
                    async with asyncio.timeout(0.05):
                        return await self.leases.get()
                except TimeoutError:
                    return Wait(reason="nothing", version=self.newest[0], digest=self.newest[1])
            case Beat():
                self.beats.append(message)
                return BeatAnswer(version=self.newest[0], digest=self.newest[1], revoked=self.revoked)
            case Result():
                self.results.append(message)
                await self.verdicts.wait()
                return Verdict(status="accepted")
            case Release():
                self.released.append(message)
                return Done()
        raise AssertionError(f"nobody expects {message}")

    def announce(self, made: Snapshot) -> None:
        self.newest = (made.version, made.digest)
        self.on_hint(VersionHint(version=made.version, digest=made.digest))

    def restart(self) -> None:
        self.epoch += 1
        self.on_epoch(self.epoch)


class Source:
    """Hands snapshots out at once, or when `open` is set."""

    def __init__(self) -> None:
        self.made: dict[int, Snapshot] = {}
        self.open = asyncio.Event()
        self.open.set()
        self.asked: list[int] = []
        self.discarded: list[int] = []

    async def fetch(self, version: int, held_base: str) -> Snapshot:
        self.asked.append(version)
        await self.open.wait()
        if version not in self.made:
            raise SnapshotError("gone")
        return self.made[version]

    async def discard(self, snapshot: Snapshot) -> None:
        self.discarded.append(snapshot.version)


class Scorer:
    async def score(self, prompt: Prompt, episode: Episode, *, evaluating: bool = False) -> Score:
        return Score(1.0, {"one": 1.0})


class Stage:
    """A generator at work, and what is around it."""

    def __init__(self, folder: Path, config: Config, step_s: float, load_s: float) -> None:
        self.folder, self.session, self.source = folder, Session(), Source()
        options = EngineOptions(folder, max_model_len=64, max_num_seqs=8)
        self.engine = FakeEngine(options, step_s=step_s, load_s=load_s, mean_tokens=1e9)
        make_model_files(folder / "model", 1000)
        rollout = RolloutRunner(config, config.rollout, folder / "model")
        self.generator = Generator(self.session, self.engine, rollout, Scorer(), self.source, config)  # type: ignore[arg-type]

    def make(self, version: int) -> Snapshot:
        writer = SnapshotWriter(self.folder / f"v{version}", lay_out([("w", "float32", (8,))]))
        writer.view(lay_out([("w", "float32", (8,))])[0])[:] = version
        self.source.made[version] = writer.finish(version)
        return self.source.made[version]

    async def load(self, version: int) -> None:
        made = self.make(version)
        self.session.announce(made)
        await until(lambda: self.engine.held == HeldVersion(version, made.digest), f"version {version} is applied")

    async def begin_to_fetch(self, version: int) -> None:
        """And come no further before `source.open` is set."""
        self.source.open.clear()
        self.session.announce(self.make(version))
        await until(lambda: self.source.asked[-1] == version, f"version {version} is being fetched")

    def lease(self, number: int = 3, attempt: int = 1, kind: str = "train", version: int = 0) -> None:
        item = LeaseItem.model_validate(
            {"kind": kind, "number": number, "row": 0, "attempt": attempt, "samples": 1 if kind == "evaluate" else 2}
            | {"version": version, "failures": 0, "ttl_s": 30.0, "num_tokens": 4, "columns": {}}
        )
        self.session.leases.put_nowait(Leases(leases=[item], tokens=np.arange(1, 5, dtype=np.int32)))

    def named(self, part: str) -> list[str]:
        return [request for request in self.engine.progress() if part in request]


@asynccontextmanager
async def at_work(
    folder: Path, config: Config = CONFIG, step_s: float = 0.001, load_s: float = 0.0
) -> AsyncIterator[Stage]:
    stage = Stage(folder, config, step_s, load_s)
    await stage.engine.start()
    working = asyncio.create_task(stage.generator.run())
    try:
        await stage.load(0)
        yield stage
        assert not working.done(), "the generator ended by itself"
        stage.generator.leave()
        async with asyncio.timeout(10):
            await working
        assert not stage.engine.progress(), "requests were left behind"
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await stage.engine.close()


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scene

    asyncio.run(limited())


def test_a_group_that_is_larger_than_the_room_is_still_asked_for_when_nothing_runs(tmp_path: Path) -> None:
    """The engine queues what it cannot run at once; never to ask would be to wait for ever."""

    async def scene() -> None:
        small = CONFIG.model_copy(update={"generators": CONFIG.generators.model_copy(update={"max_running": 1})})
        async with at_work(tmp_path, small) as stage:
            stage.lease(1)
            stage.lease(2, attempt=2)
            await until(lambda: len(stage.session.results) == 4, "both groups are answered")
            assert {pull.room for pull in stage.session.pulls} == {1}

    play(scene())


def test_no_lease_is_asked_for_while_there_is_no_room(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.01) as stage:
            for number in range(4):
                stage.lease(number, attempt=number + 1)
            await until(lambda: len(stage.named("train")) == 8, "eight completions run")
            asked = len(stage.session.pulls)
            await until(lambda: min(stage.engine.progress().values()) > 10, "some tokens later")
            assert len(stage.session.pulls) == asked
            assert {len(beat.leases) for beat in stage.session.beats} <= {0, 1, 2, 3, 4}
            assert sum(tokens for _, _, tokens in stage.session.beats[-1].leases) > 0

    play(scene())


def test_a_lease_of_the_next_epoch_may_look_like_one_of_the_last(tmp_path: Path) -> None:
    """Attempts are counted from the beginning again, so prompt and attempt repeat; the work must not be mixed up."""

    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            stage.lease(3, attempt=1)
            await until(lambda: len(stage.named("3-1")) == 2, "the lease is worked on")
            first = stage.named("3-1")
            stage.lease(3, attempt=1)
            stage.session.restart()
            await until(lambda: bool(stage.named("3-1")) and not set(stage.named("3-1")) & set(first), "the new one is")
            await until(lambda: len(stage.session.results) == 2, "it is answered")
            assert {result.epoch for result in stage.session.results} == {2}

    play(scene())


def test_a_lease_that_takes_the_place_of_a_dying_one_is_kept(tmp_path: Path) -> None:
    """An engine may need a moment to end a request; its lease then ends after the next of the same name began."""

    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            stuck = asyncio.Event()
            generate = stage.engine.generate

            async def slow_to_end(request_id: str, *rest: Any) -> Completion:
                try:
                    return await generate(request_id, *rest)
                except asyncio.CancelledError:
                    await asyncio.shield(stuck.wait())
                    raise

            stage.engine.generate = slow_to_end  # type: ignore[method-assign]
            stage.lease(3, attempt=1)
            await until(lambda: len(stage.named("3-1")) == 2, "the lease is worked on")
            stage.session.restart()
            stage.lease(3, attempt=1)
            await until(lambda: any(name.startswith("train-2-") for name in stage.named("3-1")), "the new one runs")
            stuck.set()
            seen = len(stage.session.beats)
            await until(lambda: len(stage.session.beats) > seen + 1, "two heartbeats")
            assert [lease[:2] for lease in stage.session.beats[-1].leases] == [(3, 1)]
            await until(lambda: len(stage.session.results) == 2, "it is answered")

    play(scene())


def test_a_revoked_lease_is_dropped_and_says_nothing_more(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            stage.lease(3, attempt=1)
            stage.lease(4, attempt=2)
            await until(lambda: len(stage.named("train")) == 4, "both are worked on")
            stage.session.revoked = [(3, 1)]
            await until(lambda: not stage.named("-3-1-"), "one is dropped")
            await until(lambda: len(stage.session.results) == 2, "the other is answered")
            assert {result.prompt for result in stage.session.results} == {4}

    play(scene())


def test_a_lease_that_is_revoked_while_its_result_is_under_way_ends_quietly(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path) as stage:
            stage.session.verdicts.clear()
            stage.lease(3, attempt=1)
            await until(lambda: len(stage.session.results) == 2, "its results are under way")
            stage.session.revoked = [(3, 1)]
            await until(lambda: not stage.session.beats[-1].leases, "it is dropped")
            stage.session.verdicts.set()
            stage.session.revoked = []
            stage.lease(4, attempt=2)
            await until(lambda: len(stage.session.results) == 4, "work goes on")

    play(scene())


def test_an_evaluation_that_begins_while_weights_are_fetched_keeps_its_version(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            await stage.begin_to_fetch(1)
            stage.lease(0, attempt=1, kind="evaluate")
            await until(lambda: bool(stage.named("evaluate")), "the evaluation runs")
            stage.source.open.set()
            await until(lambda: len(stage.session.results) == 1, "it is answered")
            assert [span[0] for span in stage.session.results[0].spans] == [0]
            await until(lambda: stage.engine.held is not None and stage.engine.held.version == 1, "version 1 follows")
            await until(lambda: 1 in stage.source.discarded, "it is of no use any more")
            assert (stage.source.asked.count(1), stage.source.discarded) == (2, [0, 1]), "what came too early was kept"

    play(scene())


def test_an_evaluation_that_comes_while_weights_are_loaded_is_handed_back(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, load_s=0.3) as stage:
            pulls = len(stage.session.pulls)
            await until(lambda: len(stage.session.pulls) > pulls, "a pull is under way")
            stage.session.announce(stage.make(1))
            await until(lambda: stage.generator._loading, "version 1 is being loaded")
            stage.lease(0, attempt=1, kind="evaluate")
            await until(lambda: bool(stage.session.released), "it is handed back")
            assert not stage.session.released[0].failed
            assert stage.session.results == []
            await until(lambda: stage.engine.held is not None and stage.engine.held.version == 1, "version 1 is there")

    play(scene())


def test_an_evaluation_of_another_version_is_handed_back(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path) as stage:
            await stage.load(1)
            stage.lease(0, attempt=1, kind="evaluate", version=0)
            await until(lambda: bool(stage.session.released), "it is handed back")
            assert (stage.session.released[0].number, stage.session.released[0].attempt) == (0, 1)

    play(scene())


def test_newer_weights_are_applied_in_mid_sentence_and_no_request_is_dropped(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            stage.lease(3)
            await until(lambda: bool(stage.engine.progress()) and min(stage.engine.progress().values()) > 3, "it runs")
            await stage.load(1)
            await until(lambda: len(stage.session.results) == 2, "it is answered")
            assert all([span[0] for span in result.spans] == [0, 1] for result in stage.session.results)

    play(scene())


def test_a_version_that_vanished_is_asked_for_until_a_newer_one_is_there(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path) as stage:
            gone = stage.make(1)
            del stage.source.made[1]
            stage.session.announce(gone)
            await until(lambda: stage.source.asked.count(1) >= 3, "it is asked for again")
            assert stage.source.asked.count(1) < 50, "without a pause"
            await stage.load(2)

    play(scene())


def test_weights_that_were_fetched_for_another_epoch_are_not_applied(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            before = stage.session.newest
            await stage.begin_to_fetch(1)
            stage.session.newest = before  # a learner that resumed from version 0 holds nothing newer
            stage.session.restart()
            stage.lease(0, attempt=1)
            await until(lambda: bool(stage.named("train")), "a lease of the next epoch runs")
            stage.source.open.set()
            await until(lambda: len(stage.session.results) == 2, "it is answered")
            assert [result.spans for result in stage.session.results] == [[(0, 0, 30)]] * 2

    play(scene())


def test_weights_older_than_a_lease_do_not_answer_it(tmp_path: Path) -> None:
    """A run that was resumed from version 1 may come to version 2 while a generator that holds it still fetches 1."""

    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.005) as stage:
            await stage.load(2)
            held = stage.session.newest
            await stage.begin_to_fetch(1)
            stage.session.newest = held
            stage.lease(0, attempt=1, version=2)
            await until(lambda: bool(stage.named("train")), "a lease of version 2 runs")
            stage.source.open.set()
            await until(lambda: len(stage.session.results) == 2, "it is answered")
            assert [result.spans for result in stage.session.results] == [[(2, 0, 30)]] * 2

    play(scene())


def test_leases_of_the_next_epoch_are_dropped_when_weights_of_the_last_one_come_in_between(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, load_s=0.3) as stage:
            pulls = len(stage.session.pulls)
            await until(lambda: len(stage.session.pulls) > pulls, "a pull is under way")
            stage.session.announce(stage.make(1))
            await until(lambda: stage.generator._loading, "version 1 is being loaded")
            stage.session.restart()
            stage.lease(0, attempt=1)
            await until(lambda: bool(stage.generator._running), "a lease of the next epoch came")
            await until(lambda: not stage.generator._loading, "version 1 is loaded")
            await until(lambda: not stage.generator._running, "the lease is dropped")
            await until(lambda: bool(stage.session.released), "it is handed back: silence would keep its place")
            assert [(one.number, one.attempt, one.failed) for one in stage.session.released] == [(0, 1, False)]
            assert stage.session.results == []

    play(scene())


def test_a_dead_engine_ends_the_generator_also_when_it_is_idle(tmp_path: Path) -> None:
    async def scene() -> None:
        stage = Stage(tmp_path, CONFIG, 0.001, 0.0)
        await stage.engine.start()
        working = asyncio.create_task(stage.generator.run())
        await stage.load(0)
        await stage.engine.close()
        with pytest.raises(ExceptionGroup) as caught:
            await working
        assert caught.group_contains(EngineDead)

    play(scene())


def test_leaving_ends_every_request_at_once(tmp_path: Path) -> None:
    async def scene() -> None:
        async with at_work(tmp_path, step_s=0.05) as stage:
            for number in range(4):
                stage.lease(number, attempt=number + 1)
            await until(lambda: len(stage.named("train")) == 8, "eight completions run")
        assert stage.session.results == []

    play(scene())
