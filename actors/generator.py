"""The generator: leases in, scored trajectories out, weights swapped in flight.

Four things go on at once in one asyncio loop: `_pull_leases` asks for work, one task per group answers it,
`_follow_weights` applies the newest version between two tokens, `_beat` reports and learns what was revoked.

- Nothing is sampled before the first weights are applied; which are applied only the engine's own `held` says.
- Evaluation is answered by exactly one version: `_follow_weights` waits while an evaluation runs.
- A result is repeated until the broker gives it a final status (`Session.ask`), whatever that is.
- After a restart of the broker all leases are void: `_void` drops them. A run that was resumed gives version numbers
  anew; that weights still on their way never answer a lease that they are not meant for rests on `_fits_leases`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

import numpy as np

from actors.engine import Engine, EngineStatistics, LoadTimes, RequestFailed
from actors.outcomes import error_result, release, result
from actors.rollout import Episode, RolloutFailed, attempt_for, sampling_for
from actors.rollouts.runner import RolloutRunner
from actors.scorer import Scorer
from actors.snapshot_source import SnapshotSource
from protocol.config import Config
from protocol.errors import SnapshotError
from protocol.messages import Beat, BeatAnswer, LeaseItem, Leases, Pull, Result, Verdict, VersionHint, Wait
from protocol.session import Session
from protocol.types import Lease, LeaseKind, Prompt
from protocol.weights import Snapshot

log = logging.getLogger("tether.generator")

ROOM_CHECK_S = 5.0  # a wait for room or weights is looked at again so often, whatever happened to its event


@dataclass(eq=False)
class Running:
    """One lease that is being answered."""

    lease: Lease
    epoch: int  # that it was given in; the next one counts attempts from the beginning
    task: asyncio.Task[None] | None = None
    tokens: int = 0  # of its finished turns

    @property
    def key(self) -> tuple[int, int]:
        return self.lease.prompt.number, self.lease.attempt

    @property
    def name(self) -> str:
        """Prefix of its requests to the engine."""
        return f"{self.lease.kind}-{self.epoch:x}-{self.lease.prompt.number}-{self.lease.attempt}"

    def generated(self, tokens: int) -> None:
        """A turn of one of its samples has ended."""
        self.tokens += tokens


class Generator:
    """One engine and what it is working on. `run` ends when `leave` is called or something is beyond repair."""

    def __init__(
        self,
        session: Session,
        engine: Engine,
        rollout: RolloutRunner,
        scorer: Scorer,
        source: SnapshotSource,
        config: Config,
    ) -> None:
        self._session, self._engine, self._scorer, self._source, self._config = session, engine, scorer, source, config
        self._rollout = rollout
        self._running: dict[tuple[int, int], Running] = {}  # by (prompt, attempt)
        self._newest = (0, "")  # (version, digest) as the broker says
        self._leaving = asyncio.Event()
        self._loading = False  # new weights are being put into the engine
        self._changed = asyncio.Event()  # a group ended, weights were applied, or newer ones are to be had
        self._state, self._detail, self._since = "starting", "", time.monotonic()
        self._statuses: dict[str, int] = {}
        self._apply_s, self._pause_s, self._updates = 0.0, 0.0, 0
        session.on_hint = self._hinted
        session.on_epoch = self._void
        session.on_over = self._ended

    async def run(self) -> None:
        """Work until told to leave. Raises what ended it: EngineDead, PeerTimeout, ProtocolError."""
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(loop) for loop in (self._pull_leases(tasks), self._follow_weights(), self._beat())
            ]
            await self._leaving.wait()
            for running in list(self._running.values()):
                if running.task is not None:
                    running.task.cancel()
            for task in work:
                task.cancel()

    def leave(self) -> None:
        """Drop every lease and end `run`; the session's farewell hands them back."""
        self._leaving.set()

    def _ended(self, reason: str) -> None:
        log.info("%s: this generator leaves", reason)
        self.leave()

    # --- Leases

    async def _pull_leases(self, tasks: asyncio.TaskGroup) -> None:
        while not self._leaving.is_set():
            held = self._engine.held
            room = self._config.generators.max_running - sum(
                running.lease.samples for running in self._running.values()
            )
            if held is None or self._loading or (self._running and room < self._config.samples_per_lease):
                self._say("generating" if self._running else "waiting for weights")
                await self._wait_for_change()
                continue
            if not self._running:
                self._say("waiting", self._detail or "a lease")
            pull = Pull(version=held.version, digest=held.digest, room=room)
            answer = await self._session.ask(pull, timeout_s=self._config.watchdog.orphan_s, what="a lease")
            if isinstance(answer, Leases):
                self._say("generating")
                self._start(answer, tasks)
            elif isinstance(answer, Wait):
                self._say("generating" if self._running else "waiting", answer.reason)
                self._learn_newest(answer.version, answer.digest)
                if self._newest != self._engine.held:
                    await self._wait_for_change()

    def _start(self, answer: Leases, tasks: asyncio.TaskGroup) -> None:
        offset = 0
        for item in answer.leases:
            tokens = answer.tokens[offset : offset + item.num_tokens]
            offset += item.num_tokens
            running = Running(_lease(item, tokens), self._session.epoch)
            self._running[running.key] = running
            running.task = tasks.create_task(self._answer(running))

    async def _answer(self, running: Running) -> None:
        """One group: every sample is generated, scored and delivered by itself."""
        lease = running.lease
        try:
            if lease.kind is LeaseKind.EVALUATE and not self._serves(lease.version):
                await self._session.ask(
                    release(lease, "the weights have moved on", failed=False), timeout_s=self._config.watchdog.orphan_s
                )
                return
            samples = [self._sample(running, sample) for sample in range(lease.samples)]
            await asyncio.gather(*samples)
        except asyncio.CancelledError:
            log.info("lease %s dropped: revoked, or this generator leaves", running.key)
            raise
        finally:
            if self._running.get(running.key) is running:
                del self._running[running.key]
            if not self._running:
                self._say("waiting", "a lease")
            self._changed.set()

    async def _sample(self, running: Running, sample: int) -> None:
        lease, epoch = running.lease, running.epoch
        sampling = sampling_for(lease, sample, self._config)
        attempt = attempt_for(lease, running.name, sample, sampling, self._config.run.seed)
        try:
            episode = await self._rollout.run(self._engine, lease, attempt, running.generated)
        except RequestFailed as error:
            message = error_result(lease, sample, epoch, f"generation failed: {error}")
        except RolloutFailed as error:
            message = error_result(lease, sample, epoch, f"rollout failed: {error}")
        else:
            message = await self._scored(lease, sample, epoch, episode)
        verdict = await self._session.ask(
            message, bulk=True, timeout_s=self._config.watchdog.orphan_s, what="a result's status"
        )
        assert isinstance(verdict, Verdict)
        self._statuses[verdict.status] = self._statuses.get(verdict.status, 0) + 1
        if verdict.status == "invalid":
            log.warning("result %s of prompt %d was refused: %s", sample, lease.prompt.number, verdict.reason)

    async def _scored(self, lease: Lease, sample: int, epoch: int, episode: Episode) -> Result:
        score = await self._scorer.score(lease.prompt, episode, evaluating=lease.kind is LeaseKind.EVALUATE)
        if score.error:
            return error_result(lease, sample, epoch, f"reward failed: {score.error}")
        return result(
            lease, sample, epoch, episode.completion, score.reward, score.rewards, score.metrics, score.answers
        )

    # --- Weights

    async def _follow_weights(self) -> None:
        """Apply the newest version whenever there is one, except while leases need the one we hold."""
        while True:
            is_new = bool(self._newest[1]) and self._newest != self._engine.held
            if is_new and self._may_apply(self._newest[0], self._session.epoch):
                await self._apply(self._newest[0])
            else:
                await self._wait_for_change()

    async def _apply(self, version: int) -> None:
        started, epoch = time.monotonic(), self._session.epoch
        try:
            snapshot = await self._source.fetch(version, self._engine.held_base)
        except SnapshotError as error:
            log.info("version %d was not fetched: %s", version, error)
            await asyncio.sleep(self._config.watchdog.heartbeat_s / 4)  # the next heartbeat brings the newest
            return
        if not self._may_apply(version, epoch):
            return  # leases came meanwhile that need the version we hold; the source keeps what it pulled
        try:
            times = await self._load(snapshot)
            if not self._fits_leases(version, epoch):
                await self._hand_back_all("the weights have moved on")  # they came meanwhile, for those from before
        except SnapshotError as error:
            log.info("version %d vanished before it was applied: %s", version, error)
            return
        finally:
            await self._source.discard(snapshot)
        self._updates += 1
        self._apply_s, self._pause_s = time.monotonic() - started, times.pause_s + times.load_s + times.resume_s
        log.info("version %d applied in %.3f s, generation paused for %.3f s", version, self._apply_s, self._pause_s)

    async def _load(self, snapshot: Snapshot) -> LoadTimes:
        self._loading = True
        try:
            return await self._engine.load(snapshot)
        finally:
            self._loading = False
            self._changed.set()

    def _may_apply(self, version: int, epoch: int) -> bool:
        return not self._evaluating() and self._fits_leases(version, epoch)

    def _fits_leases(self, version: int, epoch: int) -> bool:
        """Whether weights asked for in `epoch` may answer the leases that run now: no token is older than its lease."""
        return self._session.epoch == epoch and all(
            running.lease.version <= version for running in self._running.values()
        )

    def _evaluating(self) -> bool:
        return any(running.lease.kind is LeaseKind.EVALUATE for running in self._running.values())

    def _serves(self, version: int) -> bool:
        """Whether every token from now on will be of this version, as long as an evaluation runs."""
        return self._engine.held is not None and self._engine.held.version == version and not self._loading

    def _hinted(self, hint: VersionHint) -> None:
        self._learn_newest(hint.version, hint.digest)

    def _learn_newest(self, version: int, digest: str) -> None:
        if digest and (version, digest) != self._newest:
            self._newest = (version, digest)
            self._changed.set()

    # --- Reports

    async def _beat(self) -> None:
        assert self._session.welcome is not None
        while True:
            statistics = self._engine.statistics()  # raises when the engine is dead, also when it is idle
            answer = await self._session.ask(self._report(statistics), timeout_s=self._config.watchdog.orphan_s)
            if isinstance(answer, BeatAnswer):
                self._learn_newest(answer.version, answer.digest)
                for key in answer.revoked:
                    self._drop(key)
            await asyncio.sleep(self._session.welcome.heartbeat_s)

    def _report(self, statistics: EngineStatistics) -> Beat:
        progress = self._engine.progress()
        leases = []
        for running in self._running.values():
            tokens = sum(count for request, count in progress.items() if request.startswith(f"{running.name}-"))
            leases.append((*running.key, running.tokens + tokens))
        held = self._engine.held
        numbers = {
            "version": float(held.version) if held else -1.0,
            "running": float(statistics.num_running),
            "waiting": float(statistics.num_waiting),
            "kv_usage": statistics.kv_usage,
            "generated_tokens": float(statistics.generated_tokens),
            "apply_s": self._apply_s,
            "pause_s": self._pause_s,
            "updates": float(self._updates),
            **{f"results_{status}": float(count) for status, count in self._statuses.items()},
        }
        return Beat(
            state=self._state, detail=self._detail, for_s=time.monotonic() - self._since, leases=leases, numbers=numbers
        )

    def _void(self, epoch: int) -> None:
        log.info("the broker speaks for epoch %016x now: %d leases are void", epoch, len(self._running))
        self._newest = (0, "")  # of the last epoch: this one's broker says what it has
        self._drop_all()

    async def _hand_back_all(self, reason: str) -> None:
        """Drop every lease, and tell the broker: silence would keep their places until they expire."""
        dropped = [running.lease for running in self._running.values()]
        self._drop_all()
        releases = (release(lease, reason, failed=False) for lease in dropped)
        await asyncio.gather(*(self._session.ask(one, timeout_s=self._config.watchdog.orphan_s) for one in releases))

    def _drop_all(self) -> None:
        for key in list(self._running):
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        running = self._running.pop(key, None)
        if running is not None and running.task is not None:
            running.task.cancel()

    def _say(self, state: str, detail: str = "") -> None:
        if (state, detail) != (self._state, self._detail):
            self._state, self._detail, self._since = state, detail, time.monotonic()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ROOM_CHECK_S):  # not wait_for: before Python 3.12 it can swallow a cancellation
                await self._changed.wait()


def _lease(item: LeaseItem, tokens: np.ndarray) -> Lease:  # type: ignore[type-arg]
    prompt = Prompt(item.number, item.row, np.asarray(tokens, np.int32), item.columns, item.conversation)
    return Lease(LeaseKind(item.kind), prompt, item.attempt, item.samples, item.version, item.failures, item.ttl_s)
